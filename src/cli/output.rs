//! Output: bytes, times, tables, progress. People read stderr, programs stdout.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{CliError, Exit};
use crate::backup::Progress;

/// How often progress is shown on a terminal, and elsewhere.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(500);
const LOG_INTERVAL: Duration = Duration::from_secs(15);

/// Writes a line to stdout; a closed pipe is the reader's decision.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Writes a line to stderr.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes a value as JSON to stdout.
pub fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CliError::new(Exit::Failed, error.to_string()))?;
    line(&text);
    Ok(())
}

/// Tells an error and what to do.
pub fn complain(error: &CliError) {
    note(&format!("error: {}", error.message));
    if let Some(hint) = &error.hint {
        note(&format!("hint: {hint}"));
    }
}

/// Bytes for people: `1.3 GiB`.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A length of time for people: `1m 20s`.
pub fn duration(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", length.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        _ => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A table with aligned columns.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let print = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        line(padded.join("  ").trim_end());
    };
    print(header.to_vec());
    for row in rows {
        print(row.iter().map(String::as_str).collect());
    }
}

/// Shows progress until the returned handle is dropped: in place on a terminal, as log lines now
/// and then elsewhere.
pub fn show_progress(what: &'static str, progress: &Arc<Progress>) -> ShownProgress {
    let progress = progress.clone();
    let terminal = std::io::stderr().is_terminal();
    let task = tokio::spawn(async move {
        let began = Instant::now();
        loop {
            tokio::time::sleep(if terminal { TERMINAL_INTERVAL } else { LOG_INTERVAL }).await;
            let text = progress_text(what, &progress, began.elapsed());
            if terminal {
                let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
            } else {
                tracing::info!("{text}");
            }
        }
    });
    ShownProgress { task, terminal }
}

fn progress_text(what: &str, progress: &Progress, elapsed: Duration) -> String {
    let (done, total) = progress.get();
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let mut text = format!("{what}: {}", bytes(done));
    if total > 0 {
        let share = (100.0 * done as f64 / total as f64).min(100.0);
        text = format!("{text} of {} ({share:.0} %)", bytes(total.max(done)));
    }
    text = format!("{text}, {}/s", bytes(rate as u64));
    if total > done && rate > 0.0 {
        let left = Duration::from_secs_f64((total - done) as f64 / rate);
        text = format!("{text}, {} left", duration(left));
    }
    text
}

/// Progress being shown.
pub struct ShownProgress {
    task: tokio::task::JoinHandle<()>,
    terminal: bool,
}

impl Drop for ShownProgress {
    fn drop(&mut self) {
        self.task.abort();
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(duration(Duration::from_millis(1234)), "1.2s");
        assert_eq!(duration(Duration::from_secs(83)), "1m 23s");
        assert_eq!(duration(Duration::from_secs(7260)), "2h 1m");
    }
}
