"""What a driver says becomes one line with the next step, for faults that no test server can be made to have."""

import psycopg
import pytest
from psycopg import errors

from store import driver_errors

CASES: list[tuple[psycopg.Error, str, bool]] = [
    (errors.DiskFull("could not extend file: No space left on device\nHINT:  Check."), "the disk is full: what", False),
    (errors.IoError("could not read block 7"), "the server's disk failed or is full", False),
    (errors.DataCorrupted("invalid page in block 7"), "the server's files are damaged", False),
    (errors.ReadOnlySqlTransaction("cannot execute INSERT"), "it is read-only: allow writing", False),
    (errors.FeatureNotSupported("cannot set transaction read-write mode during recovery"), "it is read-only", False),
    (errors.LockNotAvailable("canceling statement due to lock timeout"), "another process keeps it locked", False),
    (errors.TooManyConnections("sorry, too many clients already"), "takes no more connections: wait", True),
    (errors.CannotConnectNow("the database system is starting up"), "is starting or stopping: wait", True),
    (errors.AdminShutdown("terminating connection\nSSL"), "the connection was lost: what was saved before", True),
    (errors.ConnectionFailure("gone"), "the connection was lost", True),
    (errors.InvalidPassword("no"), "check the user and the password", False),
    (psycopg.OperationalError("connection failed: FATAL:  the database system is starting up"), "starting or", True),
    (psycopg.OperationalError("connection timeout expired"), "no server answers there", True),
    (
        psycopg.OperationalError("server closed the connection unexpectedly\n\tThis probably"),
        "connection was lost",
        True,
    ),
    (psycopg.OperationalError('FATAL:  role "x" does not exist'), "check the user and the password", False),
]


@pytest.mark.parametrize(("error", "wanted", "passes"), CASES)
def test_a_servers_error_is_one_line(error: psycopg.Error, wanted: str, passes: bool) -> None:
    """Reason, what to do, and whether to try again; without what libpq says around it."""
    said = driver_errors.reason(error)
    assert wanted in said
    assert "\n" not in said
    assert "FATAL" not in said
    assert driver_errors.passes(error) is passes


def test_of_several_addresses_the_last_is_told() -> None:
    """A host with two addresses is tried at both."""
    tried = (
        'connection failed: connection to server at "::1", port 1 failed: Connection refused\n'
        "Multiple connection attempts failed. All failures were:\n"
        "- host: 'localhost', port: 1, hostaddr: '::1': connection failed: connection to server at \"::1\" failed: 1\n"
        "- host: 'localhost', port: 1: connection failed: connection to server at \"127.0.0.1\", port 1 failed: "
        "Connection refused"
    )
    said = driver_errors.reason(psycopg.OperationalError(tried))
    assert said.endswith("Connection refused: no server answers there: start it, or correct host and port in the URL")
    assert "\n" not in said


def test_an_unknown_error_is_told_as_it_is() -> None:
    """Nothing is made up."""
    assert driver_errors.reason(errors.DivisionByZero("division by zero\nLINE 1")) == "division by zero"
    assert driver_errors.reason(psycopg.OperationalError("")) == "no reason was given"
    assert driver_errors.passes(errors.DivisionByZero("division by zero")) is False
