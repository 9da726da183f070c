//! What the archiver is known not to do yet. Each entry is one bug or one missing part, with the
//! place in the code, and a seed that shows it; it takes one kind of fault out of the plans, or
//! loosens one check for as long as that kind of fault lasts, and nothing else.
//!
//! `PGKEEP_SIM_KNOWN=all` turns all of them on, a list of names those. Whoever mends one deletes
//! its function here.

/// Whether the seeds shall show this bug.
fn shown(name: &str) -> bool {
    let wanted = std::env::var("PGKEEP_SIM_KNOWN").unwrap_or_default();
    wanted == "all" || wanted.split(',').any(|other| other == name)
}

/// A store answers 200 and stores nothing. What it claims counts as durable, and is acknowledged
/// before it is looked at; the last small pieces of an idle server are never looked at. Seed 7.
pub fn lying_puts() -> bool {
    shown("lying_puts")
}
