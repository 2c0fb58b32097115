"""What ends a program and is no defect, each with one line that says what to do."""

START_AGAIN = 75  # exit status (EX_TEMPFAIL) of a run that resumes when it is started again


class UserError(Exception):
    """A mistake in a configuration, a path or a request. Entry points print it as one line and exit with 2."""


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. The message says where."""
