"""Where things are: the state directory and its layout (DESIGN: models/ cache/ artifacts/ logs/ db/ keys/ run/)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSTEM_STATE: Final = Path("/var/lib/aether/aurora")


def state_dir(env: Mapping[str, str], uid: int, home: Path) -> Path:
    """`$AETHER_STATE`, else /var/lib/aether/aurora for root, else ~/.local/state/aether."""
    if chosen := env.get("AETHER_STATE"):
        return Path(chosen).absolute()
    return SYSTEM_STATE if uid == 0 else home / ".local/state/aether"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths below one state directory. Directories are 0750, sockets 0660, keys 0600."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def api_socket(self) -> Path:
        """HTTP/JSON for clients."""
        return self.run / "aetherd.sock"

    @property
    def tls_socket(self) -> Path:
        """The same over TLS, for clients with a certificate."""
        return self.run / "aetherd-mtls.sock"

    @property
    def authority_socket(self) -> Path:
        """Framed link for aurorad."""
        return self.run / "authority.sock"

    @property
    def egress_socket(self) -> Path:
        """Framed link for egressd."""
        return self.run / "egress.sock"

    @property
    def secrets(self) -> Path:
        """Files that credentials may name, egressd's alone to read; the operator puts them there."""
        return self.root / "secrets"

    @property
    def spawner_socket(self) -> Path:
        return self.run / "spawner.sock"

    @property
    def supervisor(self) -> Path:
        """The supervisor's own: no role may write here."""
        return self.root / "supervisor"

    @property
    def supervisor_lock(self) -> Path:
        """Held while an instance is up."""
        return self.supervisor / "lock"

    @property
    def instance_file(self) -> Path:
        """JSON written by the supervisor while an instance is up: pids, quick ends of roles, start time."""
        return self.supervisor / "instance.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def trusted_keys(self) -> Path:
        """PEM public keys whose signatures on model packages are accepted."""
        return self.root / "keys/models"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def images(self) -> Path:
        """Unpacked images; aurorad's, shown read-only to cells."""
        return self.root / "cache/images"

    @property
    def audit(self) -> Path:
        return self.root / "logs/audit"

    @property
    def job_logs(self) -> Path:
        return self.root / "logs/jobs"

    @property
    def daemon_logs(self) -> Path:
        return self.root / "logs/daemon"

    @property
    def db(self) -> Path:
        return self.root / "db"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def pki(self) -> Path:
        """The embedded certificate authority: its certificates and private keys; aetherd's alone."""
        return self.root / "keys/pki"

    @property
    def issuers(self) -> Path:
        """Whose tokens are accepted, and what their holders may do; the operator writes it."""
        return self.root / "policy/issuers.json"

    @property
    def spire(self) -> Path:
        """spired's own: trust bundles as the SPIFFE Workload API tells them; aetherd reads them."""
        return self.root / "spire"

    @property
    def trust_bundles(self) -> Path:
        """JSON: PEM certificates by trust domain; replaced by rename."""
        return self.spire / "bundles.json"

    @property
    def audit_public_key(self) -> Path:
        """The verifier key (vkey text of the signed-note format) of the audit log."""
        return self.root / "keys/audit.pub"

    def audit_key(self, epoch: int) -> Path:
        """The private key that signs the log in this epoch."""
        return self.keys / ("audit.key" if epoch == 1 else f"audit-{epoch}.key")

    def audit_epoch_key(self, epoch: int) -> Path:
        """The verifier key of one epoch, kept when the next begins."""
        return self.keys / f"audit-{epoch}.pub"

    @property
    def witnesses(self) -> Path:
        """Who cosigns checkpoints: a verifier key and an address per line."""
        return self.root / "policy/witnesses"

    @property
    def mask(self) -> Path:
        """What the operator wants masked in records besides the known forms of secrets: a pattern per line."""
        return self.root / "policy/mask"

    @property
    def policy(self) -> Path:
        return self.root / "policy/policy.cedar"

    @property
    def cells(self) -> Path:
        """Work directories of cells; owned by the spawner."""
        return self.root / "cells"

    @property
    def spool(self) -> Path:
        """Uploads on their way in; emptied at start."""
        return self.root / "cache/spool"
