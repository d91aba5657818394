"""One detrex project per method; importing this package makes detectron2 and detrex importable."""

import warnings

import embedded

# detrex defines an operator, which nothing here uses, in torch's old way: four lines at each start
warnings.filterwarnings(
    "ignore", r"`torch\.cuda\.amp\.custom_", FutureWarning, r"detrex\.layers\.dcn_v3$"
)

RUNTIME = embedded.activate()
"""Which detectron2 and detrex serve this process, in one line."""
