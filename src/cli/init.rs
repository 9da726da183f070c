//! `pgkeep init`: writes a commented configuration and checks it.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::check::check;
use super::context::Context;
use super::{CliError, Exit, output};
use crate::config::Config;

/// Arguments of `init`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// The cluster's name: the first folder in every region
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How to reach the server, in libpq's format
    #[arg(long, value_name = "CONNINFO")]
    conninfo: Option<String>,
    /// A region; give it again for each one: eu=s3://bucket/prefix
    #[arg(long, value_name = "NAME=URL")]
    region: Vec<String>,
    /// Overwrite a configuration that exists
    #[arg(long)]
    force: bool,
    /// Write the configuration without checking it
    #[arg(long)]
    no_check: bool,
}

/// Asks for what was not given, writes, checks.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let file = context.config.clone().unwrap_or_else(|| PathBuf::from("pgkeep.toml"));
    if file.exists() && !args.force {
        return Err(CliError::new(Exit::Failed, format!("{} exists", file.display()))
            .hint("--force overwrites it, --config names another"));
    }
    let name = given_or_asked(args.name, "cluster name", "--name", "main")?;
    let default = "host=/var/run/postgresql user=pgkeep dbname=postgres";
    let conninfo =
        given_or_asked(args.conninfo, "connection to the server", "--conninfo", default)?;
    let mut regions = Vec::new();
    for text in &args.region {
        regions.push(split_region(text)?);
    }
    if regions.is_empty() {
        let text = given_or_asked(None, "first region, NAME=URL", "--region", "")?;
        regions.push(split_region(&text)?);
    }
    let text = render(&name, &conninfo, &regions);
    let config = Config::parse(&text, &file)?;
    for (region, url) in &regions {
        make_folder(region, url)?;
    }
    std::fs::write(&file, text)
        .map_err(|error| CliError::new(Exit::Failed, format!("{}: {error}", file.display())))?;
    output::note(&format!("wrote {}", file.display()));
    if args.no_check {
        return Ok(Exit::Done);
    }
    let exit = check(&config, false).await?;
    if exit == Exit::Done {
        output::note("next: \"pgkeep run\" beside the server, then \"pgkeep backup\"");
    }
    Ok(exit)
}

fn given_or_asked(
    given: Option<String>,
    what: &str,
    option: &str,
    default: &str,
) -> Result<String, CliError> {
    if let Some(value) = given {
        return Ok(value);
    }
    if !std::io::stdin().is_terminal() {
        return Err(CliError::new(Exit::Usage, format!("{what} is not given"))
            .hint(format!("{option} gives it")));
    }
    let shown = if default.is_empty() { String::new() } else { format!(" [{default}]") };
    let _ = write!(std::io::stderr(), "{what}{shown}: ");
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| CliError::new(Exit::Failed, error.to_string()))?;
    let answer = answer.trim();
    let value = if answer.is_empty() { default } else { answer };
    if value.is_empty() {
        return Err(CliError::new(Exit::Usage, format!("{what} is needed")));
    }
    Ok(value.to_owned())
}

fn split_region(text: &str) -> Result<(String, String), CliError> {
    match text.split_once('=') {
        Some((name, url)) if url.contains("://") => Ok((name.to_owned(), url.to_owned())),
        _ => Err(CliError::new(Exit::Usage, format!("region {text:?} is not NAME=URL")).hint(
            "e.g. --region eu=s3://orders-archive-eu/prod --region local=file:///srv/archive",
        )),
    }
}

/// A region in a local folder is made here and nowhere else.
fn make_folder(region: &str, url: &str) -> Result<(), CliError> {
    let Some(path) = url::Url::parse(url).ok().filter(|url| url.scheme() == "file") else {
        return Ok(());
    };
    let failed =
        |problem: String| CliError::new(Exit::Failed, format!("region {region}: {problem}"));
    let path = path.to_file_path().map_err(|()| failed("write file:///folder".into()))?;
    if !path.is_dir() {
        std::fs::create_dir_all(&path)
            .map_err(|error| failed(format!("{}: {error}", path.display())))?;
        output::note(&format!("made the folder {}", path.display()));
    }
    Ok(())
}

fn render(name: &str, conninfo: &str, regions: &[(String, String)]) -> String {
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut text = format!(
        "# pgkeep: what is archived, how, and where it goes.\n\
         # Passwords do not belong here: use PGPASSWORD, PGPASSFILE or ~/.pgpass.\n\n\
         [cluster]\n\
         # The first folder in every region.\n\
         name = {}\n\
         # libpq's format. Name all servers that may be primary, with target_session_attrs=read-write.\n\
         conninfo = {}\n\
         # The physical replication slot; it is created when it does not exist.\n\
         slot = \"pgkeep\"\n\
         # Whether WAL may be archived from a standby.\n\
         # allow_standby = false\n\n\
         [wal]\n\
         # How old WAL may get before it is stored; \"0s\": continuously.\n\
         flush_interval = \"5s\"\n\
         # When the server may forget WAL: once \"any\", a \"majority\" or \"all\" regions have it.\n\
         durability = \"any\"\n\
         # What \"majority\" and \"all\" may make the server hold for regions that do not answer, before one\n\
         # region is enough again. Never in synchronous mode.\n\
         # max_hold_bytes = \"16GiB\"\n\
         # max_hold_time = \"1h\"\n\
         # When WAL is lost for the archive: \"backup\" takes a base backup at once, \"alarm\" only says so.\n\
         # on_gap = \"backup\"\n\
         # zstd's level; the lowest are the fastest.\n\
         # compression_level = 1\n\
         # Memory for WAL on its way.\n\
         memory_limit = \"128MiB\"\n\
         # How often the archiver leaves a sign of life in each region.\n\
         # alive_interval = \"60s\"\n",
        quoted(name),
        quoted(conninfo)
    );
    text.push_str("\n# Each region holds a whole copy of the archive. Credentials come from the provider's\n# usual environment variables, or from keys here (endpoint, access_key_id …).\n");
    for (region, url) in regions {
        text.push_str(&format!("[[region]]\nname = {}\nurl = {}\n\n", quoted(region), quoted(url)));
    }
    text.push_str(
        "# [backup]\n\
         # When \"pgkeep run\" takes backups: minute, hour, day of month, month, day of week, in UTC.\n\
         # Every Sunday at 3:00 would be \"0 3 * * 0\"; \"\" is never.\n\
         # full = \"\"\n\
         # differential = \"\"\n\
         # incremental = \"\"\n\
         # A backup with damaged pages: \"keep\" it and say so, or \"fail\".\n\
         # on_checksum_failure = \"keep\"\n\
         # What the server sends in a second at most, such as 50MB; \"\" is no limit.\n\
         # max_rate = \"\"\n\
         # compression_level = 1\n\
         # Files and folders outside the data directory that are captured too: [\"/etc/postgresql\"]\n\
         # include = []\n\
         # How long a backup waits for its WAL to be in a region.\n\
         # wal_timeout = \"5m\"\n\n\
         [objectives]\n\
         # How much may be lost, and how long a recovery may take.\n\
         rpo = \"15m\"\n\
         rto = \"1h\"\n\n\
         [http]\n\
         # The status service of \"pgkeep run\"; \"\" turns it off.\n\
         listen = \"127.0.0.1:9847\"\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let regions =
            [("eu".to_owned(), "s3://a/b".to_owned()), ("us".into(), "file:///x \"y\"".into())];
        let text = render("orders", "host='a b' password=\"x\"", &regions);
        let config = Config::parse(&text, std::path::Path::new("x")).unwrap();
        assert_eq!(config.cluster.conninfo, "host='a b' password=\"x\"");
        assert_eq!(config.regions.len(), 2);
        assert_eq!(config.regions[1].url, "file:///x \"y\"");
    }

    #[test]
    fn what_stands_in_comments_is_the_default() {
        let text = render("orders", "host=db1", &[("eu".to_owned(), "s3://a/b".to_owned())]);
        let uncommented: Vec<&str> = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(key) if key.starts_with('[') || key.contains(" = ") => key,
                _ => line,
            })
            .collect();
        let read = |text: &str| Config::parse(text, std::path::Path::new("x")).unwrap();
        let all = uncommented.join("\n");
        assert!(all.contains("\non_gap = "), "{all}");
        assert_eq!(format!("{:?}", read(&all)), format!("{:?}", read(&text)));
    }
}
