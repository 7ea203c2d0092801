"""``dkm report``: what is known of a palettized model as one page, in HTML or Markdown."""
