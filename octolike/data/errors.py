"""What can be wrong with data, or with where they come from; no tensorflow."""


class DataError(ValueError):
    """Data that cannot be used as they are; the message names dataset, file or episode."""


class ServiceError(ConnectionError):
    """No worker of data.service is left to make batches; the message names them and why."""
