"""Objects of a store that are written only on a condition: none is there yet, or it is still the one that was read.

By this a run in an object store is locked and its manifests are committed. pyarrow's client knows no conditions, so
these few objects go through obstore, at the same address and with the credentials that pyarrow finds. S3 (since 2024),
Google Cloud Storage, Azure and MinIO keep such conditions.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from rdpo.errors import InputError
from rdpo.files import stores

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

Answer = TypeVar("Answer")

AZURE = ("abfs", "abfss", "az", "azure")
SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", **{scheme: scheme for scheme in AZURE}}
"""The stores that take conditions, each with the scheme that obstore calls it by."""
KINDS = {
    "NO_SUCH_BUCKET": ("NoSuchBucket", "ContainerNotFound"),
    "ACCESS_DENIED": ("PermissionDenied", "Unauthenticated", "AccessDenied", "Forbidden", "credential"),
    "NETWORK_CONNECTION": ("error sending request", "timed out"),
}
"""What a store says, by the name that pyarrow's client has for it."""
AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
"""Where profiles are, by the variables that name other files."""
CREDENTIALS = (
    "aws_access_key_id",
    "sso_",
    "role_arn",
    "credential_process",
    "login_session",
    "web_identity_token_file",
)
"""How the settings of a profile begin that lead to credentials."""


class Changed(Exception):
    """The condition does not hold: somebody else has written the object."""


@dataclass(frozen=True)
class Stored:
    """An object as it was read: its content, its version, and when it was written by the store's own clock."""

    content: bytes
    version: UpdateVersion
    written: datetime


class ConditionalObject:
    """One object of a store."""

    def __init__(self, address: str):
        """Reach nothing yet.

        Raises:
            InputError: the store is none of those that take conditions.
        """
        self.address = address
        self.store, self.path = _store(address)

    def read(self) -> Stored | None:
        """The object, or None if there is none."""
        import obstore

        def ask() -> Stored | None:
            try:
                found = obstore.get(self.store, self.path)
            except FileNotFoundError as error:
                # A bucket that is missing is an error; an object that is missing is an answer.
                if _kind(error):
                    raise
                return None
            meta = found.meta
            return Stored(bytes(found.bytes()), _version(meta), meta["last_modified"])

        return self._asked(ask)

    def create(self, content: bytes) -> UpdateVersion:
        """Write the object where there is none; its version.

        Raises:
            Changed: there is one.
        """
        return self._put(content, "create")

    def replace(self, content: bytes, version: UpdateVersion) -> UpdateVersion:
        """Write the object in the place of the one that had this version when it was read; its new version.

        Raises:
            Changed: it is another one by now, or gone.
        """
        return self._put(content, version)

    def stamp(self, content: bytes) -> datetime:
        """Write the object whatever is there, and remove it again; when that was, by the store's own clock."""
        import obstore

        def ask() -> datetime:
            obstore.put(self.store, self.path, content, mode="overwrite")
            return obstore.head(self.store, self.path)["last_modified"]

        written = self._asked(ask)
        self._asked(lambda: obstore.delete(self.store, self.path))
        return written

    def _put(self, content: bytes, mode: Literal["create"] | UpdateVersion) -> UpdateVersion:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            return _version(self._asked(lambda: obstore.put(self.store, self.path, content, mode=mode)))
        except (AlreadyExistsError, PreconditionError) as error:
            if _kind(error) == "NO_SUCH_BUCKET":
                raise _failed(error) from None
        # A request whose answer was lost is sent again, and meets what it has written itself.
        found = self.read()
        if found and found.content == content:
            return found.version
        raise Changed(self.address)

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            return ask()
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, OSError) as error:
            raise _failed(error) from None


def _version(meta: Mapping[str, Any]) -> UpdateVersion:
    # S3 and Azure go by the tag, Google by the version.
    return cast("UpdateVersion", {name: meta[name] for name in ("e_tag", "version") if meta[name]})


def _kind(error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}"
    for name, words in KINDS.items():
        if any(word in said for word in words):
            return name
    return ""


def _failed(error: BaseException) -> OSError:
    """The error as the rest of the program knows errors of stores (`stores.store_trouble`)."""
    kind = _kind(error) or "FAILURE"
    return OSError(f"Store Error {kind}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def _store(address: str) -> tuple[ObjectStore, str]:
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES:
        raise InputError(
            f"{scheme}:// address: runs cannot be locked in such a store; put the run directory on a disk, or in "
            "s3://, gs:// or Azure (abfs://)"
        )
    bucket, *path = (part for part in rest.split("/") if part)
    return _reached(SCHEMES[scheme], bucket), "/".join(path)


def _reached(scheme: str, bucket: str) -> ObjectStore:
    from obstore.store import from_url

    options: dict[str, Any] = {}
    if scheme == "s3":
        options = _s3_options()
    if scheme == "gs" and (emulator := os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT")):
        options = {"base_url": emulator, "skip_signature": True}
    return from_url(
        f"{scheme}://{bucket}",
        client_options={
            # Only an endpoint that somebody has named is without TLS.
            "allow_http": True,
            "connect_timeout": timedelta(seconds=stores.CONNECT_S),
            "timeout": timedelta(seconds=stores.ANSWER_S),
        },
        retry_config={"max_retries": stores.ATTEMPTS, "retry_timeout": timedelta(seconds=stores.ANSWER_S)},
        **options,
    )


def _s3_options() -> dict[str, Any]:
    fs, _ = stores.file_system("s3://")
    region, endpoint = fs.fs.region, stores.s3_endpoint()
    options = {"region": region, **({"endpoint": endpoint} if endpoint else {})}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return options
    return options | _other_credentials()


def _profile_source() -> str | None:
    """What names a profile with credentials, by Amazon's own rules; None if nothing does."""
    for variable in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        if os.environ.get(variable):
            return variable
    for variable, usual in AWS_FILES.items():
        path = os.environ.get(variable) or usual
        if _has_credentials(os.path.expanduser(path)):
            return path
    return None


def _has_credentials(path: str) -> bool:
    """Whether a file of profiles has credentials in one, and not only a region."""
    profiles = configparser.RawConfigParser(strict=False)
    try:
        profiles.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        # Whatever is wrong with it: somebody meant it to be read.
        return True
    return any(option.startswith(CREDENTIALS) for profile in profiles.values() for option in profile)


def _other_credentials() -> dict[str, Any]:
    """Credentials out of a profile, a login, a role of the machine: all that boto3 finds, where it is installed."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if source := _profile_source():
            raise InputError(
                f"s3:// address: credentials of an AWS profile ({source}) are read by the package boto3, which is not "
                "installed (the GPU lock leaves it out); `pip install boto3` on the machine of the driver, or give "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        # Those of a container or of the machine.
        return {}
    session = boto3.Session()
    if session.get_credentials() is None:
        return {"skip_signature": True}
    return {"credential_provider": cast(Any, Boto3CredentialProvider(session))}
