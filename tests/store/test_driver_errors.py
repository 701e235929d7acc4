"""What a driver says becomes one line with the next step, for faults that no test server can be made to have."""

import psycopg
import pytest
from psycopg import errors

from store import driver_errors

FULL, READ_ONLY, LOCKED = (
    "the disk failed or is full: what was saved before is kept; free space, then run again",
    "it is read-only: allow writing",
    "another process keeps it locked",
)
SERVER = "what was saved before is kept; start the server, or correct the URL"
CASES: list[tuple[psycopg.Error, str, bool]] = [
    (errors.DiskFull("could not extend file: No space left on device\nHINT:  Check."), FULL, False),
    (errors.IoError("could not read block 7"), FULL, False),
    (errors.DataCorrupted("invalid page in block 7"), "it is damaged", False),
    (errors.ReadOnlySqlTransaction("cannot execute INSERT"), READ_ONLY, False),
    (errors.FeatureNotSupported("cannot set transaction read-write mode during recovery"), READ_ONLY, False),
    (errors.LockNotAvailable("canceling statement due to lock timeout"), LOCKED, False),
    (errors.TooManyConnections("sorry, too many clients already"), LOCKED, True),
    (errors.CannotConnectNow("the database system is starting up"), SERVER, True),
    (errors.AdminShutdown("terminating connection\nSSL"), SERVER, True),
    (errors.ConnectionFailure("gone"), SERVER, True),
    (errors.InvalidPassword("no"), SERVER, False),
    (psycopg.OperationalError("connection failed: FATAL:  the database system is starting up"), SERVER, True),
    (psycopg.OperationalError("SSL SYSCALL error: EOF detected"), SERVER, True),
    (psycopg.OperationalError('FATAL:  role "x" does not exist'), 'role "x" does not exist: what was saved', True),
    (psycopg.InterfaceError("the connection is closed"), "the connection is closed", True),
]


@pytest.mark.parametrize(("error", "wanted", "is_transient"), CASES)
def test_a_servers_error_is_one_line(error: psycopg.Error, wanted: str, is_transient: bool) -> None:
    """Reason, what to do, and whether to try again; without what libpq says around it."""
    said = driver_errors.reason(error)
    assert wanted in said
    assert "\n" not in said
    assert "FATAL" not in said
    assert driver_errors.is_transient(error) is is_transient


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
    assert f"Connection refused: {SERVER}" in said
    assert "\n" not in said


def test_an_unknown_error_is_told_as_it_is() -> None:
    """Nothing is made up."""
    assert driver_errors.reason(errors.DivisionByZero("division by zero\nLINE 1")) == "division by zero"
    assert driver_errors.reason(psycopg.ProgrammingError("")) == "no reason was given"
    assert driver_errors.is_transient(errors.DivisionByZero("division by zero")) is False
