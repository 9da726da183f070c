//! What the tests stand on: real servers, the real program, and patience without sleeps.

mod content;
mod http;
mod keeper;
mod process;
mod proxy;
mod s3;
mod server;
mod standby;

pub use content::Content;
pub use keeper::{Keeper, files_below};
pub use process::{Folder, Spawned, cache, free_port, program, user_command, wait_until};
pub use proxy::{Fault, Proxy};
pub use s3::S3Server;
pub use server::{Server, ServerOptions};
pub use standby::conninfo_of;

/// Rounds of a randomised test: from an environment variable, else the number for every change.
pub fn rounds(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => default,
    }
}
