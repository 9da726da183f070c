//! Tests of the configuration.

use std::path::Path;

use super::*;

const SMALLEST: &str = r#"
[cluster]
name = "orders"
conninfo = "host=db1"

[[region]]
name = "eu"
url = "file:///archive"
"#;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("pgkeep.toml")).map_err(|error| error.to_string())
}

#[test]
fn a_short_configuration_has_defaults_for_the_rest() {
    let config = parse(SMALLEST).unwrap();
    assert_eq!(config.cluster.slot, "pgkeep");
    assert_eq!(config.wal.flush_interval.0, Duration::from_secs(5));
    assert_eq!(config.objectives.rpo.to_string(), "15m");
    assert_eq!(config.http.listen, "127.0.0.1:9847");
}

#[test]
fn an_unknown_key_is_named_with_file_and_line() {
    let error = parse(&format!("{SMALLEST}\n[wal]\nflush = \"1s\"\n")).unwrap_err();
    assert!(error.contains("pgkeep.toml"), "{error}");
    assert!(error.contains("line 11"), "{error}");
    assert!(error.contains("flush"), "{error}");
}

#[test]
fn values_that_cannot_be_are_refused_by_key() {
    for (addition, key) in [
        ("[wal]\nmemory_limit = \"1MiB\"", "wal.memory_limit"),
        ("[wal]\nflush_interval = \"soon\"", "flush_interval"),
        ("[wal]\ncompression_level = 99", "wal.compression_level"),
        ("[wal]\ndurability = \"some\"", "durability"),
        ("[backup]\nfull = \"0 25 * * *\"", "full"),
        ("[backup]\nmax_rate = \"31KiB\"", "backup.max_rate"),
        ("[backup]\nmax_rate = \"2GiB\"", "backup.max_rate"),
        ("[backup]\nmax_rate = \"fast\"", "max_rate"),
        ("[backup]\non_checksum_failure = \"ignore\"", "on_checksum_failure"),
        ("[[region]]\nname = \"eu\"\nurl = \"file:///other\"", "region.name"),
        ("[[region]]\nname = \"us\"\nurl = \"file:///archive\"", "region.url"),
        ("[[region]]\nname = \"../x\"\nurl = \"file:///x\"", "region.name"),
    ] {
        let error = parse(&format!("{SMALLEST}\n{addition}\n")).unwrap_err();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_schedule_that_is_none_is_named_with_file_line_and_key() {
    for (schedule, problem) in [
        ("0 25 * * *", "five fields"),
        ("every day", "five fields"),
        ("0 3 * *", "five fields"),
        ("0 0 3 * * 0", "five fields"),
        ("@daily", "five fields"),
        ("0 3 30 2 *", "never"),
    ] {
        let error =
            parse(&format!("{SMALLEST}\n[backup]\nincremental = \"{schedule}\"\n")).unwrap_err();
        for part in ["pgkeep.toml", "line 11", "incremental", schedule, problem] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}

#[test]
fn rates_are_told_to_the_server_in_its_unit() {
    let kilobytes = |text: &str| {
        let config = parse(&format!("{SMALLEST}\n[backup]\nmax_rate = \"{text}\"\n")).unwrap();
        config.backup.max_rate_kilobytes()
    };
    assert_eq!(kilobytes(""), None);
    assert_eq!(kilobytes("32KiB"), Some(32));
    assert_eq!(kilobytes("50MB"), Some(48_828));
    assert_eq!(kilobytes("1GiB"), Some(1_048_576));
}

#[test]
fn spans_and_sizes_are_read_as_people_write_them() {
    assert_eq!("90s".parse::<Span>().unwrap().to_string(), "90s");
    assert_eq!("30d".parse::<Span>().unwrap().0, Duration::from_secs(30 * 86_400));
    assert_eq!("0s".parse::<Span>().unwrap().0, Duration::ZERO);
    assert_eq!("128MiB".parse::<ByteSize>().unwrap().0, 128 << 20);
    for text in ["", "s", "5", "5 minutes", "-5s", "99999999999999999999d"] {
        assert!(text.parse::<Span>().is_err(), "{text}");
    }
}

/// All settings that have defaults, as text.
fn defaults_of(config: &Config) -> String {
    let Config { wal, backup, objectives, http, .. } = config;
    format!("{wal:?} {backup:?} {objectives:?} {http:?}")
}

// The README promises all keys with their defaults.
#[test]
fn the_readme_tells_every_key_and_its_default() {
    let readme = include_str!("../../README.md");
    let at = readme.find("```toml\n[cluster]").unwrap() + "```toml\n".len();
    let text = &readme[at..at + readme[at..].find("```").unwrap()];
    let told = parse(text).unwrap();
    assert_eq!(defaults_of(&told), defaults_of(&parse(SMALLEST).unwrap()));
    assert_eq!((told.cluster.slot.as_str(), told.cluster.allow_standby), ("pgkeep", false));
    // The parser names every key that it knows when it meets one that it does not.
    for section in ["cluster", "wal", "backup", "objectives", "http"] {
        let wrong = text.replace(&format!("[{section}]\n"), &format!("[{section}]\nno_key = 1\n"));
        let error = parse(&wrong).unwrap_err();
        let known = error.split("expected").nth(1).unwrap();
        for key in known.split('`').skip(1).step_by(2) {
            assert!(text.contains(&format!("\n{key} = ")), "README: no {key} in [{section}]");
        }
    }
}
