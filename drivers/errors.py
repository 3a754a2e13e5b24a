"""What a driver raises. The message names the device, what was found, what was expected and what to do."""


class DriverError(Exception):
    """A device or its library does not do what was asked."""


class MissingLibraryError(DriverError):
    """A vendor library is not installed, or another package answers to its name; the message says what to install."""


class DeviceNotFoundError(DriverError):
    """The device is not connected, or not where the rig file says."""


class DeviceUnsuitableError(DriverError):
    """The device cannot do what the rig file asks: mode, firmware, USB speed, motor family, calibration."""


class DeviceLostError(DriverError):
    """The device stopped answering. Close and open again to go on; the old connection is not to be used."""


class DeviceFaultError(DriverError):
    """The device reports a fault of its own. `clear`, on the operator's word, may end it."""
