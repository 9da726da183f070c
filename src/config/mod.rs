//! The configuration: `pgkeep.toml`, its schema, loading and checking.
//!
//! Unknown keys are errors. Every error names the file, and where the TOML parser knows it, line
//! and key. Passwords do not belong here: they come from the environment and from password files.

mod include;
mod schedule;
mod units;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use schedule::Schedule;
pub use units::{ByteSize, Span};

/// The smallest `wal.memory_limit`: a piece being cut, one being compressed, one being sent.
pub const MIN_MEMORY_LIMIT: u64 = 64 << 20;
/// The rates that the server takes, in kilobytes a second (`MAX_RATE_LOWER`, `MAX_RATE_UPPER`).
pub const MAX_RATES: std::ops::RangeInclusive<u64> = 32..=1_048_576;

/// A whole configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is archived.
    pub cluster: ClusterConfig,
    /// How WAL is archived.
    #[serde(default)]
    pub wal: WalConfig,
    /// Where it goes.
    #[serde(default, rename = "region")]
    pub regions: Vec<RegionConfig>,
    /// How backups are taken.
    #[serde(default)]
    pub backup: BackupConfig,
    /// What must be met.
    #[serde(default)]
    pub objectives: ObjectivesConfig,
    /// The status service of `pgkeep run`.
    #[serde(default)]
    pub http: HttpConfig,
}

/// `[cluster]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Its name: the first folder in every region.
    pub name: String,
    /// How to reach it, in libpq's format.
    #[serde(default)]
    pub conninfo: String,
    /// The physical replication slot.
    #[serde(default = "default_slot")]
    pub slot: String,
    /// Whether WAL may be archived from a standby.
    #[serde(default)]
    pub allow_standby: bool,
}

/// When WAL counts as safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Once any region has it.
    #[default]
    Any,
    /// Once more than half of the regions have it.
    Majority,
    /// Once all regions have it.
    All,
}

/// What a gap in the archive calls for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnGap {
    /// A new base backup at once.
    #[default]
    Backup,
    /// Only the alarm.
    Alarm,
}

/// `[wal]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WalConfig {
    /// How old WAL may get before it is stored; 0: continuously.
    pub flush_interval: Span,
    /// When WAL counts as safe.
    pub durability: Durability,
    /// How much WAL that some region has `majority` and `all` may make the slot hold for the others,
    /// before they give way to `any`; no limit while commits wait for the archiver.
    pub max_hold_bytes: ByteSize,
    /// For how long.
    pub max_hold_time: Span,
    /// What to do when WAL is lost for the archive.
    pub on_gap: OnGap,
    /// zstd's level, negative ones included.
    pub compression_level: i32,
    /// Memory for WAL on its way.
    pub memory_limit: ByteSize,
    /// How often the archiver says that it is alive.
    pub alive_interval: Span,
}

/// `[[region]]`.
#[derive(Clone, Debug, Deserialize)]
pub struct RegionConfig {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub url: String,
    /// Options of the store: endpoint, credentials …
    #[serde(flatten)]
    pub options: BTreeMap<String, toml::Value>,
}

/// What becomes of a backup in which the server found pages with wrong checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnChecksumFailure {
    /// It is kept, and says which pages.
    #[default]
    Keep,
    /// It is given up.
    Fail,
}

/// `[backup]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupConfig {
    /// When `run` takes full backups.
    #[serde(deserialize_with = "units::or_empty")]
    pub full: Option<Schedule>,
    /// When `run` takes differential backups.
    #[serde(deserialize_with = "units::or_empty")]
    pub differential: Option<Schedule>,
    /// When `run` takes incremental backups.
    #[serde(deserialize_with = "units::or_empty")]
    pub incremental: Option<Schedule>,
    /// What to do when the server finds pages with wrong checksums.
    pub on_checksum_failure: OnChecksumFailure,
    /// Bytes a second that the server sends at most.
    #[serde(deserialize_with = "units::or_empty")]
    pub max_rate: Option<ByteSize>,
    /// zstd's level.
    pub compression_level: i32,
    /// How long to wait for the WAL that makes a backup restorable.
    pub wal_timeout: Span,
    /// Files and folders outside the data directory that are captured with each backup.
    pub include: Vec<PathBuf>,
}

impl BackupConfig {
    /// The rate in the unit of the server, kilobytes a second.
    pub fn max_rate_kilobytes(&self) -> Option<u32> {
        self.max_rate.and_then(|rate| u32::try_from(rate.0 / 1024).ok())
    }
}

/// `[objectives]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectivesConfig {
    /// How much may be lost, in time.
    pub rpo: Span,
    /// How long a recovery may take.
    pub rto: Span,
}

/// `[http]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Address and port; an empty text turns the service off.
    pub listen: String,
}

fn default_slot() -> String {
    "pgkeep".to_owned()
}

impl Default for WalConfig {
    fn default() -> Self {
        WalConfig {
            flush_interval: Span(Duration::from_secs(5)),
            durability: Durability::Any,
            on_gap: OnGap::Backup,
            max_hold_bytes: ByteSize(16 << 30),
            max_hold_time: Span(Duration::from_secs(3600)),
            compression_level: 1,
            memory_limit: ByteSize(128 << 20),
            alive_interval: Span(Duration::from_secs(60)),
        }
    }
}

impl Default for BackupConfig {
    fn default() -> Self {
        BackupConfig {
            full: None,
            differential: None,
            incremental: None,
            on_checksum_failure: OnChecksumFailure::Keep,
            max_rate: None,
            compression_level: 1,
            wal_timeout: Span(Duration::from_secs(300)),
            include: Vec::new(),
        }
    }
}

impl Default for ObjectivesConfig {
    fn default() -> Self {
        ObjectivesConfig {
            rpo: Span(Duration::from_secs(15 * 60)),
            rto: Span(Duration::from_secs(3600)),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig { listen: "127.0.0.1:9847".to_owned() }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {file}: {message}")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        message: String,
    },
    /// It is not TOML of this schema.
    #[error("configuration {file}: {message}")]
    Parse {
        /// The file.
        file: PathBuf,
        /// What the parser said, with line and key.
        message: String,
    },
    /// A value that cannot be.
    #[error("configuration {file}: {key}: {problem}")]
    Value {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or anything in it cannot be used.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError::Read {
            file: file.to_owned(),
            message: error.to_string(),
        })?;
        Config::parse(&text, file)
    }

    /// Checks the text of `file`.
    ///
    /// # Errors
    /// When anything in it cannot be used.
    pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| ConfigError::Parse {
            file: file.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.check().map_err(|(key, problem)| ConfigError::Value {
            file: file.to_owned(),
            key,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let fail = |key: &str, problem: &str| Err((key.to_owned(), problem.to_owned()));
        if !is_name(&self.cluster.name) {
            return fail("cluster.name", "letters, digits, '-', '_' and '.' make a name");
        }
        let slot_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let slot = &self.cluster.slot;
        if slot.is_empty() || slot.len() > 63 || !slot.chars().all(slot_char) {
            return fail("cluster.slot", "slots have names of lower-case letters, digits and '_'");
        }
        if self.wal.memory_limit.0 < MIN_MEMORY_LIMIT {
            return fail("wal.memory_limit", "at least 64MiB are needed");
        }
        let levels = zstd::compression_level_range();
        if !levels.contains(&self.wal.compression_level) {
            return fail("wal.compression_level", "zstd has no such level");
        }
        if !levels.contains(&self.backup.compression_level) {
            return fail("backup.compression_level", "zstd has no such level");
        }
        if let Some(problem) = include::problem_of(&self.backup.include) {
            return fail("backup.include", &problem);
        }
        if self.backup.max_rate.is_some_and(|rate| !MAX_RATES.contains(&(rate.0 / 1024))) {
            return fail("backup.max_rate", "the server takes 32KiB to 1GiB a second");
        }
        if self.wal.alive_interval.0 < Duration::from_secs(1) {
            return fail("wal.alive_interval", "at least 1s");
        }
        if self.regions.is_empty() {
            return fail("region", "at least one [[region]] with name and url is needed");
        }
        for (index, region) in self.regions.iter().enumerate() {
            if !is_name(&region.name) {
                return fail("region.name", "letters, digits, '-', '_' and '.' make a name");
            }
            if self.regions[..index].iter().any(|other| other.name == region.name) {
                return Err((
                    "region.name".into(),
                    format!("two regions are named {:?}", region.name),
                ));
            }
            if self.regions[..index].iter().any(|other| other.url == region.url) {
                return Err((
                    "region.url".into(),
                    format!(
                        "two regions have the URL {:?}: a copy beside itself protects nothing",
                        region.url
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Names become parts of object keys and file names.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 100 && name.chars().all(allowed) && !name.starts_with('.')
}

impl RegionConfig {
    /// The store's options as texts.
    pub fn option_texts(&self) -> BTreeMap<String, String> {
        let text = |value: &toml::Value| match value {
            toml::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        self.options.iter().map(|(key, value)| (key.clone(), text(value))).collect()
    }
}

#[cfg(test)]
mod tests;
