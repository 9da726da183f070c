//! PostgreSQL on the wire: connection, replication commands, the WAL stream, the BASE_BACKUP
//! stream; plain SQL through tokio-postgres on a second connection.

mod backup_stream;
mod connection;
mod conninfo;
mod error;
mod message;
mod passfile;
mod replication;
mod socket;
mod sql;
mod tls;
mod wal_stream;

pub use backup_stream::{BackupEvent, BackupOptions, BackupStream, BackupTablespace};
pub use connection::{Connection, Purpose};
pub use conninfo::{
    ConnInfo, ConnInfoError, Host, HostSpec, SslMode, Surroundings, TargetSessionAttrs,
};
pub use error::{PgError, ServerError};
pub use passfile::Secret;
pub use replication::{IdentifySystem, NextTimeline};
pub use sql::{ServerFacts, SlotFacts, Sql};
pub use wal_stream::{StreamEnd, WalMessage, WalStream};
