"""Reference models, the tasks they are trained for, and recipes."""
