"""``python -m dkm_export`` is the same as ``dkm``."""

from dkm_export.cli.main import main

raise SystemExit(main())
