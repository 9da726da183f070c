//! Every keyword that libpq knows, the environment variable that stands in for it, and what pgkeep
//! does with it. None may be missing: a connection string that works with `psql` must not fail here
//! with "unknown keyword".

/// What becomes of a keyword of libpq.
#[derive(Clone, Copy, Debug)]
pub(super) enum Handling {
    Used,
    /// Nothing that was asked for gets lost without it.
    Ignored,
    /// The advice to who sets it.
    Refused(&'static str),
}

use Handling::{Ignored, Refused, Used};

const NO_OAUTH: Handling = Refused("pgkeep has no OAuth; use a password or a client certificate");
const NO_SCRAM_KEYS: Handling = Refused("use password, PGPASSWORD or a password file");

/// Every keyword of libpq 18, and `servicefile` of 19: name, environment variable, handling.
pub(super) const KEYWORDS: &[(&str, &str, Handling)] = &[
    ("service", "PGSERVICE", Used),
    ("servicefile", "PGSERVICEFILE", Used),
    ("user", "PGUSER", Used),
    ("password", "PGPASSWORD", Used),
    ("passfile", "PGPASSFILE", Used),
    ("channel_binding", "PGCHANNELBINDING", Used),
    ("connect_timeout", "PGCONNECT_TIMEOUT", Used),
    ("dbname", "PGDATABASE", Used),
    ("host", "PGHOST", Used),
    ("hostaddr", "PGHOSTADDR", Used),
    ("port", "PGPORT", Used),
    // pgkeep reads what the server says, and chooses the encoding itself.
    ("client_encoding", "PGCLIENTENCODING", Ignored),
    ("options", "PGOPTIONS", Used),
    ("application_name", "PGAPPNAME", Used),
    ("fallback_application_name", "", Used),
    ("keepalives", "", Used),
    ("keepalives_idle", "", Used),
    ("keepalives_interval", "", Used),
    ("keepalives_count", "", Used),
    ("tcp_user_timeout", "", Used),
    ("sslmode", "PGSSLMODE", Used),
    ("sslnegotiation", "PGSSLNEGOTIATION", Used),
    // TLS libraries have dropped it.
    ("sslcompression", "PGSSLCOMPRESSION", Ignored),
    ("sslcert", "PGSSLCERT", Used),
    ("sslkey", "PGSSLKEY", Used),
    ("sslcertmode", "PGSSLCERTMODE", Used),
    (
        "sslpassword",
        "",
        Refused("keep the key in a file without a password that only pgkeep's user can read"),
    ),
    ("sslrootcert", "PGSSLROOTCERT", Used),
    ("sslcrl", "PGSSLCRL", Used),
    (
        "sslcrldir",
        "PGSSLCRLDIR",
        Refused("put the revocation lists into one file and name it with sslcrl"),
    ),
    ("sslsni", "PGSSLSNI", Used),
    ("requirepeer", "PGREQUIREPEER", Used),
    ("require_auth", "PGREQUIREAUTH", Used),
    ("min_protocol_version", "PGMINPROTOCOLVERSION", Used),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION", Used),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Used),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Used),
    ("gssencmode", "PGGSSENCMODE", Used),
    // They say how to do what pgkeep never does.
    ("krbsrvname", "PGKRBSRVNAME", Ignored),
    ("gsslib", "PGGSSLIB", Ignored),
    ("gssdelegation", "PGGSSDELEGATION", Ignored),
    // pgkeep knows which of its connections replicate.
    ("replication", "", Ignored),
    ("target_session_attrs", "PGTARGETSESSIONATTRS", Used),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS", Used),
    ("scram_client_key", "", NO_SCRAM_KEYS),
    ("scram_server_key", "", NO_SCRAM_KEYS),
    ("oauth_issuer", "", NO_OAUTH),
    ("oauth_client_id", "", NO_OAUTH),
    ("oauth_client_secret", "", NO_OAUTH),
    ("oauth_scope", "", NO_OAUTH),
    // Not to write down a connection's keys is the safe side.
    ("sslkeylogfile", "", Ignored),
];

/// Keywords whose values nobody may see.
pub(super) const SECRETS: &[&str] =
    &["password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"];
