//! What was understood, as a connection string that hides the password: for logs and errors. Read
//! again it means the same, but for what is hidden.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::choices::RequireAuth;
use super::text::is_space;
use super::{ConnInfo, SslRootCert};

impl ConnInfo {
    /// A connection string that says the same, with `***` for the password.
    pub fn redacted(&self) -> String {
        let pairs = self.address_pairs().into_iter().chain(self.security_pairs());
        let given = pairs.filter_map(|(keyword, value)| Some((keyword, value?)));
        let words: Vec<String> =
            given.map(|(keyword, value)| format!("{keyword}={}", quoted(&value))).collect();
        words.join(" ")
    }

    fn address_pairs(&self) -> Vec<(&'static str, Option<String>)> {
        let addresses = list(
            self.hosts
                .iter()
                .map(|host| host.hostaddr.map_or_else(String::new, |address| address.to_string())),
        );
        let has_addresses = self.hosts.iter().any(|host| host.hostaddr.is_some());
        let seconds = |time: Option<Duration>| time.map(|time| time.as_secs().to_string());
        vec![
            ("host", Some(list(self.hosts.iter().map(|host| &host.host)))),
            ("hostaddr", has_addresses.then_some(addresses)),
            ("port", Some(list(self.hosts.iter().map(|host| host.port)))),
            ("user", Some(self.user.clone())),
            ("password", self.password.as_ref().map(|_| "***".to_owned())),
            ("dbname", self.dbname.clone()),
            ("passfile", path_text(&self.passfile)),
            ("application_name", self.application_name.clone()),
            ("options", self.options.clone()),
            ("connect_timeout", seconds(self.connect_timeout)),
            ("keepalives", unless(if self.keepalives { "1" } else { "0" }, "1")),
            ("keepalives_idle", seconds(self.keepalives_idle)),
            ("keepalives_interval", seconds(self.keepalives_interval)),
            ("keepalives_count", self.keepalives_count.map(|count| count.to_string())),
            ("tcp_user_timeout", self.tcp_user_timeout.map(|time| time.as_millis().to_string())),
            ("target_session_attrs", unless(self.target_session_attrs.as_str(), "any")),
            ("load_balance_hosts", unless(self.load_balance_hosts.as_str(), "disable")),
        ]
    }

    fn security_pairs(&self) -> Vec<(&'static str, Option<String>)> {
        let root = self.ssl_root_cert.as_ref().map(|root| match root {
            SslRootCert::System => "system".to_owned(),
            SslRootCert::File(path) => path.display().to_string(),
        });
        vec![
            ("sslmode", Some(self.ssl_mode.as_str().to_owned())),
            ("sslnegotiation", unless(self.ssl_negotiation.as_str(), "postgres")),
            ("sslrootcert", root),
            ("sslcert", path_text(&self.ssl_cert)),
            ("sslkey", path_text(&self.ssl_key)),
            ("sslcrl", path_text(&self.ssl_crl)),
            ("sslsni", unless(if self.ssl_sni { "1" } else { "0" }, "1")),
            ("ssl_min_protocol_version", unless(self.ssl_min_protocol_version.as_str(), "TLSv1.2")),
            ("ssl_max_protocol_version", unless(self.ssl_max_protocol_version.as_str(), "TLSv1.3")),
            ("channel_binding", unless(self.channel_binding.as_str(), "prefer")),
            ("require_auth", self.require_auth.as_ref().map(RequireAuth::to_string)),
        ]
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnInfo({})", self.redacted())
    }
}

/// Items with commas between them.
pub(super) fn list<T: fmt::Display>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

fn path_text(path: &Option<PathBuf>) -> Option<String> {
    path.as_ref().map(|path| path.display().to_string())
}

/// A value that is worth a word because it is not the default.
fn unless(text: &str, default: &str) -> Option<String> {
    (text != default).then(|| text.to_owned())
}

/// A value as it stands in a connection string. One that seems to hold a whole connection string of
/// another driver may hold its password too.
pub(super) fn quoted(value: &str) -> String {
    let lower = value.to_ascii_lowercase();
    if ["password=", "pwd=", "://"].iter().any(|mark| lower.contains(mark)) {
        return "***".to_owned();
    }
    if !value.is_empty() && !value.contains(|c| is_space(c) || c == '\'' || c == '\\') {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}
