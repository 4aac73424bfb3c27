-- One row for each case: what arrived for one patient identifier, and how far it has come.
-- `remade` counts the retries that had results made anew.
-- `sealed` is 1 from the moment a case is claimed: later images of that identifier start a new case.
CREATE TABLE IF NOT EXISTS cases (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    identifier TEXT    NOT NULL,
    folder     TEXT    NOT NULL,
    state      TEXT    NOT NULL,
    sealed     INTEGER NOT NULL DEFAULT 0,
    attempts   INTEGER NOT NULL DEFAULT 0,
    error      TEXT    NOT NULL DEFAULT '',
    remade     INTEGER NOT NULL DEFAULT 0,
    created    REAL    NOT NULL,
    changed    REAL    NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS open_case ON cases (identifier) WHERE sealed = 0;
CREATE INDEX IF NOT EXISTS case_state ON cases (state, id);
CREATE INDEX IF NOT EXISTS case_identifier ON cases (identifier, id);
CREATE INDEX IF NOT EXISTS case_folder ON cases (folder, id);

-- One row for each instance and input that holds it: the promise behind the answer 0x0000.
-- `damaged` is 1 where the file was found missing or broken; while the case takes images, a resend
-- heals it.
CREATE TABLE IF NOT EXISTS instances (
    case_id INTEGER NOT NULL REFERENCES cases (id),
    input   TEXT    NOT NULL,
    uid     TEXT    NOT NULL,
    file    TEXT    NOT NULL,
    size    INTEGER NOT NULL,
    digest  BLOB    NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (case_id, input, uid)
) WITHOUT ROWID;

-- One row for each dataset that process() returned, written before the first is sent. `digest` is
-- SHA-256 over the file.
CREATE TABLE IF NOT EXISTS results (
    case_id   INTEGER NOT NULL REFERENCES cases (id),
    number    INTEGER NOT NULL,
    uid       TEXT    NOT NULL,
    sop_class TEXT    NOT NULL,
    syntax    TEXT    NOT NULL,
    file      TEXT    NOT NULL,
    digest    BLOB    NOT NULL,
    PRIMARY KEY (case_id, number)
) WITHOUT ROWID;

-- One row for each result and endpoint that was asked to keep it: what it answered the last time.
-- `stored` is 1 where that means that it has the result.
CREATE TABLE IF NOT EXISTS deliveries (
    case_id  INTEGER NOT NULL REFERENCES cases (id),
    endpoint TEXT    NOT NULL,
    uid      TEXT    NOT NULL,
    status   INTEGER NOT NULL,
    stored   INTEGER NOT NULL DEFAULT 1,
    comment  TEXT    NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (case_id, endpoint, uid)
) WITHOUT ROWID;

-- One row for each case and endpoint of which something is known: all is SENT, it is PENDING and tried
-- again, or it is DEAD, given up. `waited` counts the seconds between attempts, not those of a clock
-- that may be set.
CREATE TABLE IF NOT EXISTS exports (
    case_id  INTEGER NOT NULL REFERENCES cases (id),
    endpoint TEXT    NOT NULL,
    state    TEXT    NOT NULL DEFAULT 'PENDING',
    attempts INTEGER NOT NULL DEFAULT 0,
    refusals INTEGER NOT NULL DEFAULT 0,
    waited   REAL    NOT NULL DEFAULT 0,
    next     REAL    NOT NULL DEFAULT 0,
    problem  TEXT    NOT NULL DEFAULT '',
    PRIMARY KEY (case_id, endpoint)
) WITHOUT ROWID;

-- One row for each endpoint that takes no associations: one attempt at `next` tells for all cases.
CREATE TABLE IF NOT EXISTS outages (
    endpoint TEXT    NOT NULL PRIMARY KEY,
    attempts INTEGER NOT NULL,
    next     REAL    NOT NULL,
    problem  TEXT    NOT NULL
) WITHOUT ROWID;

-- One row for each image of a case that took images when the node ended. Its sender may not have got
-- the last answers, and then sends all of it again.
CREATE TABLE IF NOT EXISTS interrupted (
    case_id INTEGER NOT NULL REFERENCES cases (id),
    input   TEXT    NOT NULL,
    uid     TEXT    NOT NULL,
    digest  BLOB    NOT NULL,
    PRIMARY KEY (case_id, input, uid)
) WITHOUT ROWID;

-- One row for a case that has waited for images. `seconds` since its last image, counted while a node
-- ran; `reason` is what it waits for, or waited for where it was processed as it is: `forced`.
-- `revises` is the earlier case whose images it holds, too; `too_late_for` the one that was over when
-- its images came; `conflict` an image of it that came under another identifier before.
CREATE TABLE IF NOT EXISTS waits (
    case_id      INTEGER PRIMARY KEY REFERENCES cases (id),
    seconds      REAL    NOT NULL DEFAULT 0,
    reason       TEXT    NOT NULL DEFAULT '',
    forced       INTEGER NOT NULL DEFAULT 0,
    revises      INTEGER NOT NULL DEFAULT 0,
    too_late_for INTEGER NOT NULL DEFAULT 0,
    conflict     TEXT    NOT NULL DEFAULT ''
);

-- One row for each series of a case that is DONE, so that a late image is known as one.
CREATE TABLE IF NOT EXISTS series (
    case_id INTEGER NOT NULL REFERENCES cases (id),
    uid     TEXT    NOT NULL,
    PRIMARY KEY (case_id, uid)
) WITHOUT ROWID;

-- One row: what tells the UIDs made from this ledger from those of any other.
CREATE TABLE IF NOT EXISTS identity (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    seed BLOB    NOT NULL
);
INSERT OR IGNORE INTO identity (only, seed) VALUES (1, randomblob(16));

-- One row for each result that a node made itself, whose UID none of its images had. What comes back is
-- known by it.
CREATE TABLE IF NOT EXISTS made (
    number  INTEGER PRIMARY KEY,
    uid     TEXT    NOT NULL UNIQUE,
    case_id INTEGER NOT NULL
);

-- One row for each endpoint that was asked to keep the results of a case, and has not reported yet.
CREATE TABLE IF NOT EXISTS commitments (
    transaction_uid TEXT    NOT NULL PRIMARY KEY,
    case_id         INTEGER NOT NULL,
    endpoint        TEXT    NOT NULL
) WITHOUT ROWID;

-- One row for each instance that a sender asked this node to keep, with the newest request for it.
CREATE TABLE IF NOT EXISTS asked (
    uid             TEXT NOT NULL PRIMARY KEY,
    transaction_uid TEXT NOT NULL,
    calling         TEXT NOT NULL,
    moment          REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS asked_together ON asked (transaction_uid);
