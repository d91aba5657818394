"""One detrex project per method; importing this package makes detectron2 and detrex importable."""

import embedded

RUNTIME = embedded.activate()
"""Which detectron2 and detrex serve this process, in one line."""
