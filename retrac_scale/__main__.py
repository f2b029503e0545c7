"""For `python -m retrac_scale`."""

import sys

from retrac_scale.cli.main import main

sys.exit(main())
