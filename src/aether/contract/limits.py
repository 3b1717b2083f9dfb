"""Every bound that more than one part relies on, in one place; units last in names.

A bound is a promise to an honest client (documented in SPECIFICATION.md) and the answer to a hostile one.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Between roles
PROTOCOL_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 256 * KIB
"""Larger data crosses as a descriptor (SCM_RIGHTS), never inside a frame."""
LINK_CALLS_IN_FLIGHT_MAX: Final = 1024
RECONCILE_JOBS_MAX: Final = 200
LINK_WRITE_BUFFER_BYTES_MAX: Final = 4 * MIB
SPAWNER_MESSAGE_BYTES_MAX: Final = 160 * KIB
"""One SOCK_SEQPACKET message; the kernel's default wmem_max of 212,992 bytes bounds it."""

# At the edge
HTTP_BODY_BYTES_MAX: Final = 192 * KIB
"""A JSON request body: must fit in a frame after re-encoding. Larger inputs are uploaded as artifacts."""
HTTP_HEADER_BYTES_MAX: Final = 32 * KIB
HTTP_HEADER_TIMEOUT_S: Final = 10.0
HTTP_BODY_IDLE_TIMEOUT_S: Final = 15.0
HTTP_WRITE_IDLE_TIMEOUT_S: Final = 30.0
HTTP_CONNECTIONS_MAX: Final = 1024
HTTP_CONNECTIONS_PER_UID_MAX: Final = 512
WAIT_S_MAX: Final = 60.0
UPLOAD_BYTES_MAX: Final = 1 * GIB
PAGE_ITEMS_MAX: Final = 500
PAGE_ITEMS_DEFAULT: Final = 50
JSON_DEPTH_MAX: Final = 32

# Jobs
ARGV_ITEMS_MAX: Final = 256
ARGV_BYTES_MAX: Final = 64 * KIB
ENV_ITEMS_MAX: Final = 128
ENV_BYTES_MAX: Final = 32 * KIB
PYTHON_IMPORTS_MAX: Final = 16
PYTHON_MODULE_CHARS_MAX: Final = 128
INPUT_FILES_MAX: Final = 1024
OUTPUT_GLOBS_MAX: Final = 32
OUTPUT_FILES_MAX: Final = 1024
OUTPUT_BYTES_MAX: Final = 1 * GIB
PATH_BYTES_MAX: Final = 1024
LABELS_MAX: Final = 16
LABELS_CARRIED_MAX: Final = 64
"""Of what was given and of all that was read."""
LABEL_PATTERN: Final = r"^[a-z0-9]([a-z0-9._/-]{0,62}[a-z0-9])?$"
TIMEOUT_MS_DEFAULT: Final = 600_000
TIMEOUT_MS_MAX: Final = 7 * 24 * 3600 * 1000
STOP_GRACE_MS_DEFAULT: Final = 2_000
STOP_GRACE_MS_MAX: Final = 60_000
JOBS_OPEN_MAX: Final = 10_000
"""Jobs accepted and not yet terminal; above it the answer is 429."""
IDEMPOTENCY_WINDOW_S: Final = 300
IDEMPOTENCY_KEYS_MAX: Final = 500_000
"""Keys remembered within the window (about 200 bytes each); above it keyed submissions get 429."""
IDEMPOTENCY_KEY_CHARS_MAX: Final = 128
RESULT_INLINE_BYTES_MAX: Final = 64 * KIB
"""A result up to this size is answered inline and kept in the blob table; a larger one is a file."""

# Cells
MEMORY_BYTES_DEFAULT: Final = 512 * MIB
MEMORY_BYTES_MIN: Final = 4 * MIB
CPU_MILLIS_DEFAULT: Final = 1_000
"""Thousandths of one CPU."""
CPU_MILLIS_MIN: Final = 10
PIDS_DEFAULT: Final = 128
PIDS_MAX: Final = 32_768
NOFILE_DEFAULT: Final = 1_024
FILE_BYTES_DEFAULT: Final = 4 * GIB
TMP_BYTES_DEFAULT: Final = 64 * MIB
DISK_BYTES_DEFAULT: Final = 4 * GIB
"""What a cell keeps on disk: its work directory and the layers of its overlays."""
DISK_BYTES_MIN: Final = 1 * MIB
WORK_ENTRIES_MAX: Final = 200_000
"""Names below a cell's work directory and layers."""
WORK_DEPTH_MAX: Final = 256
"""Directories within directories there."""
WEIGHT_MAX: Final = 10_000
"""Of CPU and I/O; 100 is everybody's default (cgroup-v2.rst, "Weights")."""
CPU_LIST_CHARS_MAX: Final = 256
CPU_LIST_PATTERN: Final = r"^[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*$"
"""CPUs or memory nodes, such as 0-3,6 (cpuset(7), "List format")."""
SCHED_PERIOD_US_MAX: Final = 4_194_304
"""The longest period of SCHED_DEADLINE that the kernel takes (sched_deadline_period_max_us)."""
CELLS_LIVE_MAX: Final = 2_000
EXECUTABLES_PER_CELL_MAX: Final = 64
CELLS_ALLOCATED_MAX: Final = 1_000
"""Allocated cells of one tenant."""
CELL_NAME_CHARS_MAX: Final = 511
CELL_DEPTH_MAX: Final = 8
CELL_IDLE_MS_MIN: Final = 100
EXECUTABLES_LIVE_MAX: Final = 32
"""Executables that live at once in one cell: the table of its PID 1."""
FILES_LISTED_MAX: Final = 4_096
ATTACHED_MAX: Final = 256
"""Connections to terminals and standard inputs, of all callers."""
TERMINAL_SIZE_MAX: Final = 4_096
"""Rows or columns."""
CELL_UID_BASE: Final = 0x7000_0000
CELL_UID_BLOCK: Final = 65_536
"""Each cell owns one block of uids; above the ranges of subuid and systemd-nspawn."""
CELL_UID_SLOTS: Final = 4_096
DAEMON_UID_BASE: Final = 0x6FFF_F000
"""aetherd +1, aurorad +2, keeper +3, egressd +4; their shared group is DAEMON_UID_BASE itself."""

# Images
IMAGE_BYTES_MAX: Final = 8 * GIB
"""An unpacked image; its archive is bounded by UPLOAD_BYTES_MAX."""
IMAGE_ENTRIES_MAX: Final = 400_000
IMAGE_LAYERS_MAX: Final = 128
IMAGE_DOCUMENT_BYTES_MAX: Final = 1 * MIB
"""A manifest, an index or a configuration."""
IMAGE_UNPACK_S_MAX: Final = 600
IMAGES_MAX: Final = 1_000
"""Of one tenant; above it the answer is 429."""
DIFF_ENTRIES_MAX: Final = 100_000

# Logs of executables
LOG_HEAD_BYTES_MAX: Final = 1 * MIB
LOG_TAIL_BYTES_MAX: Final = 4 * MIB
LOG_RATE_BYTES_PER_S: Final = 8 * MIB
LOG_BURST_BYTES: Final = 4 * MIB
LOG_READ_BYTES_MAX: Final = 64 * KIB

# Egress
EGRESS_PORT: Final = 3128
"""Where the proxy listens on the loopback of every cell that has a network; the cell's own network namespace."""
EGRESS_RULES_MAX: Final = 128
EGRESS_CREDENTIALS_MAX: Final = 16
EGRESS_CONNECTIONS_DEFAULT: Final = 64
EGRESS_CONNECTIONS_MAX: Final = 256
EGRESS_REQUESTS_PER_S_DEFAULT: Final = 100
EGRESS_REQUESTS_PER_S_MAX: Final = 10_000
EGRESS_BYTES_DEFAULT: Final = 1 * GIB
"""Each way, over the life of the cell."""
EGRESS_CONNECTION_MS_DEFAULT: Final = 3_600_000
EGRESS_IDLE_MS_DEFAULT: Final = 60_000
EGRESS_HEADER_BYTES_MAX: Final = 32 * KIB
EGRESS_HEADER_TIMEOUT_S: Final = 10.0
EGRESS_SECRET_BYTES_MAX: Final = 8 * KIB
EGRESS_BATCH_INTERVAL_S: Final = 0.5
EGRESS_BATCH_ROWS_MAX: Final = 100
"""Connections told at once; those alike in all but time and bytes are one row with their count."""
EGRESS_RECORDS_PER_JOB_MAX: Final = 2_000
"""Records of connections per job; what comes after is in the totals alone."""

# Events of cells
CELL_EVENTS_PER_S: Final = 500
"""Exec, exit and signal events kept of one cell; above it, and after the burst, they are counted and dropped."""
CELL_EVENTS_BURST: Final = 2_000
EVENTS_HEAD_BYTES_MAX: Final = 256 * KIB
EVENTS_TAIL_BYTES_MAX: Final = 1 * MIB
EVENTS_READ_BYTES_MAX: Final = 64 * KIB
TRACE_MS_DEFAULT: Final = 5_000
TRACE_MS_MAX: Final = 30_000
TRACES_LIVE_MAX: Final = 8
"""System-call traces at once on one node."""

# Tickets
TICKET_MS_DEFAULT: Final = 24 * 3600 * 1000
TICKET_MS_MAX: Final = 366 * 24 * 3600 * 1000
"""How long a minted ticket holds: each expires, so that what is remembered of it ends."""
TICKETS_MAX: Final = 1_000
"""Minted tickets of one tenant that are not expired; above it the answer is 429."""
TICKET_EPOCHS_MAX: Final = 16
"""Keys of tickets kept at once: the newest, and those of earlier epochs of which a ticket may still be used."""
TENANT_REQUESTS_PER_S: Final = 10_000
"""And as many at once; the operator may set another quota. Above it the answer is 429."""
PRINCIPAL_REQUESTS_PER_S: Final = 5_000
USAGE_DAYS_KEPT: Final = 400
USAGE_ROWS_MAX: Final = 10_000
"""Of one day: tenant, principal and kind of job; further principals are counted together."""
TICKET_ACCOUNTS_MAX: Final = 10_000
"""Links with a budget of one ticket that have spent something; above it the answer is 429."""
TICKET_LINKS_REVOKED_MAX: Final = 64
"""Revoked links of one ticket; above it only the ticket itself can be revoked."""

# Approvals
APPROVAL_MS_DEFAULT: Final = 3_600_000
"""How long a request waits for its approval before it is cancelled, never longer than its ticket holds."""
APPROVAL_MS_MIN: Final = 1_000
APPROVAL_MS_MAX: Final = 7 * 24 * 3600 * 1000
APPROVALS_WAITING_MAX: Final = 500
"""Requests of one tenant that wait for an approval; above it the answer is 429."""
APPROVAL_REASON_CHARS_MAX: Final = 500

# Policy
POLICY_BYTES_MAX: Final = 128 * KIB
"""A policy set's text; as a JSON string it fits in a request."""
POLICY_RULES_MAX: Final = 1_000
POLICY_TOKENS_MAX: Final = 2_000
"""Words and signs of one policy: Cedar recurses over joined terms, and 30,000 overflow its stack."""
POLICY_DEPTH_MAX: Final = 32
"""How deep brackets nest in one policy: Cedar recurses over them, and 1,000 overflow its stack."""
POLICY_NAME_CHARS_MAX: Final = 128
POLICY_VERSIONS_MAX: Final = 100
"""Loaded versions that are listed; a rollback reaches any of them."""
POLICY_CASES_MAX: Final = 1_000
"""Cases of one `policy.test`."""
POLICY_CHANGES_MAX: Final = 1_000
"""Changed decisions that one `policy.diff` or `policy.counterfactual` names; the rest is counted."""

# Identity
KEY_MS_DEFAULT: Final = 90 * 24 * 3600 * 1000
"""How long an API key holds unless asked otherwise; at most as long as a ticket."""
CERTIFICATE_MS_DEFAULT: Final = 24 * 3600 * 1000
CERTIFICATE_MS_MAX: Final = 30 * 24 * 3600 * 1000
"""The longest life of a certificate, and so of a replaced authority."""
TRUST_DOMAIN_DEFAULT: Final = "aether.internal"
CSR_BYTES_MAX: Final = 8 * KIB
TOKEN_CHARS_MAX: Final = 8 * KIB
TOKEN_S_MAX: Final = 24 * 3600
"""The longest life of a token (JWT) that any issuer may be allowed; the default is an hour."""
TOKEN_LEEWAY_S: Final = 30
"""How far the clock of an issuer may be off."""
TLS_HANDSHAKES_MAX: Final = 128
"""TLS handshakes in progress, of all callers; above it connections wait in the backlog."""

# Audit
RECORD_BYTES_MAX: Final = 65_535
"""C2SP tlog-tiles: an entry bundle holds entries with a 16-bit length."""
SEGMENT_BYTES_MAX: Final = 64 * MIB
SEGMENT_FRAME_BYTES_MAX: Final = 1 * MIB
"""One group commit, its header included; so is what a write that was cut off can leave behind."""
CHECKPOINT_INTERVAL_S: Final = 1.0
TILE_WIDTH: Final = 256
AUDIT_SEARCH_RECORDS_MAX: Final = 50_000
"""Records that one page of a search looks at; the next page goes on from there."""
AUDIT_KEEP_MS_MIN: Final = 1_000
AUDIT_KEEP_MS_MAX: Final = 100 * 366 * 24 * 3600 * 1000
WITNESSES_MAX: Final = 32
"""Of one log."""
AUDIT_PAGE_BYTES_MAX: Final = 1 * MIB
DISK_FREE_BYTES_MIN: Final = 64 * MIB
"""Admission stops (507) below this plus the room of every open outcome."""
OUTCOME_BYTES_RESERVED: Final = 16 * KIB
ENDINGS_BYTES_RESERVED: Final = 2 * MIB
"""Room kept for records of tickets revoked and cells ended: about 2,000 of them on a full disk."""

# Models
MODEL_PACKAGE_BYTES_MAX: Final = 512 * MIB
MODEL_BATCH_MAX: Final = 64
MODEL_JOBS_IN_FLIGHT_MAX: Final = 512
