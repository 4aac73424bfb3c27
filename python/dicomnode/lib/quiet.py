"""pydicom without what it warns of: texts that quote values, also those of a patient.

Solves that such a text is printed to stderr, that Python remembers each that it has not seen before
for good, which is memory without bound where strangers choose the values, and that pydicom logs the
same text. `pydicom.config.debug()` shows the log again.
"""

import logging
import warnings

from pydicom import config


def quiet_pydicom() -> None:
    """From now on, in this process, pydicom and pynetdicom warn of nothing, and pydicom logs nothing.

    An error is raised as before. Where pydicom is debugged its log is left as it is.
    """
    warnings.filterwarnings("ignore", module=r"(pydicom|pynetdicom)(\.|$)")
    if not config.debugging:
        logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
