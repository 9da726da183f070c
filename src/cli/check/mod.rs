//! `pgkeep check`: tests all that the configuration needs, item by item.

mod region;
mod server;
mod slots;

use clap::Args as ClapArgs;
use futures_util::future::join_all;
use serde::Serialize;

use super::context::{Context, conninfo};
use super::{CliError, Exit, output};
use crate::backup::{Schedules, survey};
use crate::config::Config;

/// Arguments of `check`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// How an item turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failed,
}

#[derive(Debug, Serialize)]
struct Item {
    item: String,
    state: State,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct Items {
    items: Vec<Item>,
}

impl Items {
    fn add(&mut self, item: &str, state: State, detail: impl Into<String>, hint: Option<String>) {
        self.items.push(Item { item: item.to_owned(), state, detail: detail.into(), hint });
    }

    fn ok(&mut self, item: &str, detail: impl Into<String>) {
        self.add(item, State::Ok, detail, None);
    }

    fn warn(&mut self, item: &str, detail: impl Into<String>, hint: &str) {
        self.add(item, State::Warning, detail, Some(hint.to_owned()));
    }

    fn fail(&mut self, item: &str, detail: impl Into<String>, hint: Option<String>) {
        self.add(item, State::Failed, detail, hint);
    }
}

/// Checks; exit code 1 when anything failed.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    check(&config, args.json).await
}

/// Checks a configuration that was loaded.
pub async fn check(config: &Config, as_json: bool) -> Result<Exit, CliError> {
    let mut items = Items::default();
    items.ok("configuration", format!("cluster {}", config.cluster.name));
    check_schedules(config, &mut items);
    let server = async {
        let mut items = Items::default();
        match conninfo(config) {
            Ok(conninfo) => server::check(config, &conninfo, &mut items).await,
            Err(error) => items.fail("connection string", error.message, error.hint),
        }
        items
    };
    // All at once: one that hangs holds up no other.
    let regions = join_all(config.regions.iter().map(|region| region::check(config, region)));
    let (server, regions) = tokio::join!(server, regions);
    items.items.extend(server.items);
    check_include(config, &mut items).await;
    items.items.extend(regions.into_iter().flat_map(|region| region.items));
    if as_json {
        output::json(&items)?;
    } else {
        print(&items);
    }
    let failed = items.items.iter().any(|item| item.state == State::Failed);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

/// Whether what is captured beside backups can be read, by whoever runs this.
async fn check_include(config: &Config, items: &mut Items) {
    const ITEM: &str = "captured files";
    let paths = config.backup.include.clone();
    if paths.is_empty() {
        return;
    }
    match tokio::task::spawn_blocking(move || survey(&paths)).await {
        Ok(Ok(found)) => {
            let count = format!("{} files, {}", found.files, output::bytes(found.bytes));
            match found.failures.first() {
                None => items.ok(ITEM, count),
                Some(first) => items.warn(
                    ITEM,
                    format!("{count}; {} cannot be captured: {first}", found.failures.len()),
                    "the user who runs pgkeep must be able to read what backup.include names",
                ),
            }
        }
        Ok(Err(error)) => items.fail(ITEM, error.to_string(), None),
        Err(error) => items.fail(ITEM, error.to_string(), None),
    }
}

/// What `run` takes by itself. Nothing is no failure: backups may be called from elsewhere.
fn check_schedules(config: &Config, items: &mut Items) {
    let item = "backup schedule";
    let schedules = Schedules::new(&config.backup);
    match schedules.is_empty() {
        true => items.add(
            item,
            State::Ok,
            "nothing is scheduled",
            Some(
                "set backup.full and backup.incremental, or call \"pgkeep backup\" from a timer"
                    .into(),
            ),
        ),
        false if schedules.full.is_none() => items.warn(
            item,
            "no full backup is scheduled",
            "set backup.full: without it every backup builds on an ever older one",
        ),
        false => {
            let named = [
                ("full", &schedules.full),
                ("differential", &schedules.differential),
                ("incremental", &schedules.incremental),
            ];
            let told = named.iter().filter_map(|(kind, schedule)| {
                schedule.as_ref().map(|schedule| format!("{kind} at \"{schedule}\""))
            });
            items.ok(item, format!("{} (UTC)", told.collect::<Vec<_>>().join(", ")));
        }
    }
}

fn print(items: &Items) {
    for item in &items.items {
        let state = match item.state {
            State::Ok => "ok     ",
            State::Warning => "WARNING",
            State::Failed => "FAILED ",
        };
        output::line(&format!("{state}  {}: {}", item.item, item.detail));
        if let Some(hint) = &item.hint {
            output::line(&format!("           -> {hint}"));
        }
    }
}
