"""`python -m pytorch_quant`."""

import sys

from pytorch_quant.cli import main

sys.exit(main())
