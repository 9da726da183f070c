//! PostgreSQL on the wire: connection, replication commands, the WAL stream, the BASE_BACKUP
//! stream; plain SQL through tokio-postgres on a second connection.

mod authenticate;
mod backup_stream;
mod connection;
mod connector;
mod conninfo;
mod dial;
mod error;
mod greeted;
mod message;
mod passfile;
mod replication;
mod slot;
mod socket;
mod sql;
mod standby_slots;
mod synchronous;
mod tls;
mod wal_stream;

pub use backup_stream::{BackupEvent, BackupOptions, BackupStream, BackupTablespace};
pub use connection::Connection;
pub use connector::Connector;
pub use conninfo::{
    ConnInfo, ConnInfoError, Host, HostSpec, SslMode, Surroundings, TargetSessionAttrs,
};
pub use dial::{Addresses, Dial, Dialed, Network};
pub use error::{PgError, ServerError};
pub use passfile::Secret;
pub use replication::{IdentifySystem, NextTimeline};
pub use slot::{SlotFacts, SlotStatus, SlotWatch, time_until_limit, wal_rate};
pub use socket::{Duplex, OpenSocket};
pub use sql::{ServerFacts, Sql};
pub use standby_slots::{check_standby, keep_slots_on_standbys};
pub use synchronous::{SynchronousNames, SynchronousRole, SynchronousVerdict};
pub use wal_stream::{StreamEnd, WalMessage, WalStream};
