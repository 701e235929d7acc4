"""A store's database: a SQLite file, or PostgreSQL behind a URL, read and written in the same way.

A write takes the store's one lock at its start and a read sees one state throughout, so that check-then-insert is right
on both. No lock is held between transactions.
"""

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, func, select
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema

from profiles.records.errors import NotMeasuredError, PolicyError, StoreError
from profiles.records.files import user_folder
from profiles.records.text import command
from store import driver_errors

Location: TypeAlias = Path | str  # a SQLite file, or the URL of a PostgreSQL database
Access: TypeAlias = Literal["read", "write"]
Result = TypeVar("Result")

SERVER_DRIVER = "postgresql+psycopg"
STUDIES_NAME = "optuna.db"
WRITERS_LOCK = 0x6472616674  # PostgreSQL's advisory lock that all writers of a database take
CONNECT_TIMEOUT_S = 10
_PAUSE_S = 0.05


def is_url(location: Location) -> bool:
    """Whether `location` is a server's; a Path never is."""
    return isinstance(location, str) and "://" in location


def name_of(location: Location) -> str:
    """A store's name for messages: its file, or its URL without password and options. Raises StoreError: a bad URL."""
    return _server_name(_server_url(location)) if isinstance(location, str) and is_url(location) else str(location)


def _retry(work: Callable[[], Result], timeout_s: float) -> Result:
    """Do `work` again after an error that passes (a lock, a lost connection), until the timeout ends."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return work()
        except (StoreError, sqlalchemy.exc.DBAPIError, sqlite3.Error) as error:
            cause = error.__cause__ if isinstance(error, StoreError) else error
            if cause is None or not driver_errors.is_transient(cause) or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


@dataclass(kw_only=True)
class Database:
    """A SQLAlchemy engine with the transactions of a store."""

    engine: Engine
    name: str  # for errors, without a password
    path: Path | None  # SQLite's file; None for a server
    busy_timeout_s: float  # for locks, and for a lost server once the database has answered
    read_only: bool
    _has_answered: bool = False
    _file_id: tuple[int, int] | None = None  # of the file when it was opened

    @contextmanager
    def transaction(self, access: Access) -> Iterator[Connection]:
        """One transaction, rolled back on leaving unless `commit()` was called; driver errors become StoreError.

        A write takes its lock at the start: two processes then wait for each other instead of failing midway.
        """
        try:
            connection = _retry(lambda: self._begin(access), self.busy_timeout_s if self._has_answered else 0.0)
            self._has_answered = True
            try:
                yield connection
            finally:
                connection.close()
        except StoreError as error:
            raise type(error)(f"store {self.name}: {error}") from error
        except (NotMeasuredError, PolicyError):
            raise  # not of the database: the caller's own, raised inside the block
        except (sqlalchemy.exc.DBAPIError, sqlite3.Error) as error:
            raise StoreError(f"store {self.name}: {driver_errors.reason(error)}") from error
        except (sqlalchemy.exc.SQLAlchemyError, ValueError, TypeError, LookupError, RecursionError) as error:
            text = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            reason = text.splitlines()[0]
            raise StoreError(f"store {self.name}: a row cannot be read or written: {reason}") from error

    def read(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work` in a transaction that reads; again when the connection is lost midway."""
        return _retry(lambda: self._do_once("read", work), self.busy_timeout_s)

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work` in a transaction that writes, and commit; again when the connection is lost midway.

        `work` must bear being done twice: what was lost may have been the answer to the commit.
        """
        return _retry(lambda: self._do_once("write", work), self.busy_timeout_s)

    def _do_once(self, access: Access, work: Callable[[Connection], Result]) -> Result:
        with self.transaction(access) as connection:
            result = work(connection)
            connection.commit()
        return result

    def close(self) -> None:
        self.engine.dispose()

    def use_write_ahead_log(self) -> None:
        """SQLite then lets readers read while one writes; stored in the file, so it costs nothing the next time."""
        self._execute_outside("PRAGMA journal_mode = WAL")

    def vacuum(self) -> None:
        """Give the space of deleted rows back to the disk; a server does that by itself."""
        self._execute_outside("VACUUM")

    def _execute_outside(self, statement: str) -> None:
        """Execute a statement of SQLite outside of a transaction, which SQLAlchemy would begin."""
        if self.path is not None:
            with self.transaction("read") as connection:
                connection.rollback()
                driver: Any = connection.connection.driver_connection
                _retry(lambda: driver.execute(statement), self.busy_timeout_s)  # SQLite does not wait by itself here

    @property
    def folder(self) -> Path:
        """Where the store's files on this host go: beside SQLite's file, or for a server in a folder named after it.

        That one is in $DRAFTPICK_STORE where this is a folder, else in the user's data folder.
        """
        if self.path is not None:
            return self.path.parent
        named = os.environ.get("DRAFTPICK_STORE", "")
        home = Path(named) if named and not is_url(named) else user_folder("data")
        url = self.engine.url
        parts = [url.host or "", str(url.port or 5432), url.database or "", _option(url, "options")]
        return home / "servers" / re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(filter(None, parts)))

    def studies_location(self) -> Location:
        """Where Optuna's tables go: a file beside SQLite's, or a schema beside the server's, made where it is missing.

        They cannot share a schema: both call their table of versions `alembic_version`. The URL holds the password.
        """
        if self.path is not None:
            return self.path.with_name(STUDIES_NAME)

        def make_schema(connection: Connection) -> str:
            schema = f"{connection.scalar(select(func.current_schema()))}_optuna"
            if not sqlalchemy.inspect(connection).has_schema(schema):
                connection.execute(CreateSchema(schema))
            return schema

        escaped = re.sub(r"([\\ ])", r"\\\1", self.write(make_schema).replace('"', '""'))
        options = f'{_option(self.engine.url, "options")} -c search_path="{escaped}"'
        url = self.engine.url.update_query_dict({"options": options.strip()})
        return url.render_as_string(hide_password=False)

    def _begin(self, access: Access) -> Connection:
        connection = self.engine.connect()
        try:
            if self.path is not None:
                connection.execution_options(sqlite_begin="BEGIN IMMEDIATE" if access == "write" else "BEGIN")
            elif access == "read" or self.read_only:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            connection.begin()
            if self.path is None and access == "write":
                connection.execute(select(func.pg_advisory_xact_lock(WRITERS_LOCK)))
            self._require_same_file()
        except BaseException:
            connection.close()
            raise
        return connection

    def _require_same_file(self) -> None:
        """Raises StoreError when the open file is no longer the one of that name: rows in it would be lost."""
        if self.path is None or self.read_only:
            return
        try:
            status = self.path.stat()
        except OSError as error:
            raise StoreError("the file was deleted or moved while it was open: put it back, or run again") from error
        file_id = (status.st_dev, status.st_ino)
        self._file_id = self._file_id or file_id
        if file_id != self._file_id:
            raise StoreError("the file was replaced by another while it was open: run again")


def connect(location: Location, busy_timeout_s: float, *, read_only: bool = False) -> Database:
    """Nothing is opened yet, but for the folder of a new SQLite file, which is made unless `read_only`.

    Raises StoreError: the folder cannot be made, or the URL cannot be used.
    """
    if isinstance(location, str) and is_url(location):
        url = _server_url(location)
        engine, name = _server(url, busy_timeout_s), _server_name(url)
        return Database(engine=engine, name=name, path=None, busy_timeout_s=busy_timeout_s, read_only=read_only)
    path = Path(location)
    if path.is_dir():
        raise StoreError(f"store {path}: unable to open database file: it is a folder: name a file")
    if read_only and not path.exists():
        raise StoreError(f"store {path}: it is not there: run `{command('run')}` first, or name another store")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"store {path}: its folder cannot be made: {error.strerror}") from error
    engine = _file(path, busy_timeout_s, read_only=read_only)
    return Database(engine=engine, name=str(path), path=path, busy_timeout_s=busy_timeout_s, read_only=read_only)


def _server_name(url: URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)


def _to_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _file(path: Path, busy_timeout_s: float, *, read_only: bool) -> Engine:
    def open_file() -> sqlite3.Connection:
        # isolation_level None: sqlite3 sends no BEGIN of its own, so that schema changes are in the transaction too
        uri = _uri(path, read_only=read_only)
        connection = sqlite3.connect(
            uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        # with a write-ahead log a killed process loses nothing, and a power failure at most the last commits
        connection.execute("PRAGMA synchronous = NORMAL")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        return connection

    engine = sqlalchemy.create_engine(
        URL.create("sqlite", database=str(path)),
        creator=open_file,
        json_serializer=_to_json,
        # whoever only reads opens the file for each transaction: how it may be opened changes with its log
        **({"poolclass": NullPool} if read_only else {}),
    )

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine


def _uri(path: Path, *, read_only: bool) -> str:
    """SQLite's URI of a file; whoever only reads leaves no file beside it, and needs no right to write.

    Who may write opens it so even to read (with `query_only`): SQLite then removes the log and the shared memory it
    made. Else, where there is no log, no one is writing and the file is called immutable, which needs neither.
    """
    mode = "rwc"
    if read_only:
        may_write = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        mode = "rw" if may_write else "ro" if _has_log(path) else "ro&immutable=1"
    return f"file:{quote(str(path.absolute()))}?mode={mode}"


def _has_log(path: Path) -> bool:
    log = path.with_name(f"{path.name}-wal")
    return log.exists() and log.stat().st_size > 0


def _server_url(text: str) -> URL:
    """Raises StoreError without repeating the text, which may hold a password."""
    needed = f"a folder, sqlite:///FILE or {SERVER_DRIVER}://USER:PASSWORD@HOST/DATABASE is needed"
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise StoreError(f"the store's URL cannot be read: {needed}") from error
    if url.drivername not in (SERVER_DRIVER, "postgresql") or not url.database:
        fault = "" if url.database else "it names no database: "
        raise StoreError(f"store {_server_name(url)}: {fault}{needed}")
    return url.set(drivername=SERVER_DRIVER)


def _server(url: URL, busy_timeout_s: float) -> Engine:
    options = f"{_option(url, 'options')} -c lock_timeout={max(1, round(busy_timeout_s * 1000))}"
    given = {"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "draftpick", "client_encoding": "utf8"}
    arguments = {name: value for name, value in given.items() if name not in url.query}
    try:
        return sqlalchemy.create_engine(
            url,
            connect_args={**arguments, "options": options.strip()},
            json_serializer=_to_json,
            pool_pre_ping=True,  # between two units lie minutes in which the server may have gone and come back
        )
    except ImportError as error:
        name = _server_name(url)
        raise StoreError(f"store {name}: the driver is not installed: pip install 'psycopg[binary]'") from error


def _option(url: URL, name: str) -> str:
    value = url.query.get(name, "")
    return value if isinstance(value, str) else value[-1]
