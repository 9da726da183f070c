//! What the archiver is known not to do yet. Each entry is one bug or one missing part, with the
//! place in the code, and a seed that shows it; it takes one kind of fault out of the plans, or
//! loosens one check for as long as that kind of fault lasts, and nothing else.
//!
//! `PGKEEP_SIM_KNOWN=all` turns all of them on, a list of names (`lying_puts,hangs_stall_sessions`)
//! those. Whoever mends one deletes its function here.

use std::time::Duration;

/// Whether the seeds shall show this bug.
fn shown(name: &str) -> bool {
    let wanted = std::env::var("PGKEEP_SIM_KNOWN").unwrap_or_default();
    wanted == "all" || wanted.split(',').any(|other| other == name)
}

/// A store answers 200 and stores nothing. What it claims counts as durable, and is acknowledged.
pub fn lying_puts() -> bool {
    shown("lying_puts")
}

/// One region that hangs holds up the begin of every session, for all regions: `check_lineage` and
/// `find_start` wait for all of them, up to 84 s an attempt; `read_archived` waits 532 s for one
/// `get`. Seeds 1 and 7. So long after a hang other regions may be late.
pub fn hangs_stall_sessions() -> Duration {
    if shown("hangs_stall_sessions") { Duration::ZERO } else { Duration::from_secs(2400) }
}

/// A hot spare that has streamed before writes `alive/` with every look at the slot: twice a
/// second, and what it says is old. Seed 10. An idle spare may send so many requests a second.
pub fn spares_say_alive() -> u64 {
    if shown("spares_say_alive") { 0 } else { 5 }
}

/// WAL that was removed before a fork is never called lost: `record_gap` gives up for any timeline
/// that is not the server's, and archiving stands still. Seed 4.
pub fn gaps_before_forks() -> bool {
    shown("gaps_before_forks")
}

/// A clone is recognized by WAL that both have; where the archive ends at a boundary of pieces
/// there is none (`start_point` begins exactly there), and the clone's WAL is archived. Seed 207.
pub fn clones_at_boundaries() -> bool {
    shown("clones_at_boundaries")
}

/// A receiver that cannot hand on what it has (no region takes WAL, the queue is full) reads
/// nothing more: it never hears that the server wants to shut down, and does not let it go after
/// `SHUTDOWN_PATIENCE`, while its status messages keep the server waiting. Seed 111.
pub fn stalled_receivers_hold_shutdowns() -> bool {
    shown("stalled_receivers_hold_shutdowns")
}

/// A region that is behind cannot be repaired across a recorded gap: `copy_pieces` asks for all up
/// to the next piece, finds no source that has it without a hole, and copies what lies before the
/// gap again and again, for ever. Seed 926. Without this, servers that remove WAL have one region.
pub fn gaps_stop_repairs() -> bool {
    shown("gaps_stop_repairs")
}
