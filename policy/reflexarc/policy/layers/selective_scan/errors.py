"""What can be wrong with a scan, by name."""

from __future__ import annotations

from reflexarc.contract.errors import ReflexarcError


class ScanInputError(ReflexarcError):
    """A tensor of a wrong shape, dtype or device, or one that is not finite."""

    code = "scan_input"


class ScanUnavailableError(ReflexarcError):
    """The backend that ``REFLEXARC_SCAN`` names does not run here, or there is none of the name."""

    code = "scan_unavailable"
