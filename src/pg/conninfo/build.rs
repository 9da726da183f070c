//! From settings to what they mean: defaults are filled in, values checked, and what pgkeep cannot
//! honour is refused. `ssl` has the part that concerns TLS.

use std::path::Path;
use std::time::Duration;

use super::choices::{ChannelBinding, LoadBalance, RequireAuth, TargetSessionAttrs};
use super::environment::Surroundings;
use super::error::ConnInfoError;
use super::keywords::{Handling, KEYWORDS};
use super::settings::Settings;
use super::ssl::{client_certificate, root_certificate, ssl_mode, ssl_negotiation, tls_versions};
use super::text::is_space;
use super::{ConnInfo, Host, HostSpec, Secret};

const DEFAULT_PORT: u16 = 5432;

/// What the settings ask for, or why that cannot be had.
pub(super) fn build(
    settings: &Settings,
    surroundings: &Surroundings<'_>,
) -> Result<ConnInfo, ConnInfoError> {
    let hosts = hosts(settings, &surroundings.default_socket_directory)?;
    refuse_unsupported(settings, &hosts)?;
    let root = root_certificate(settings, surroundings);
    let (ssl_min, ssl_max) = tls_versions(settings)?;
    let ssl_mode = ssl_mode(settings, root.as_ref(), &hosts)?;
    let (ssl_cert, ssl_key) = client_certificate(settings, surroundings)?;
    let home_passfile = || surroundings.home.as_ref().map(|home| home.join(".pgpass"));
    let user = settings.owned("user").or_else(|| surroundings.os_user.clone());
    // One that is given empty is empty, and the fallback is not asked.
    let named = ["application_name", "fallback_application_name"];
    let name = named.into_iter().find(|keyword| settings.is_set(keyword));
    let seconds = |keyword| Ok(settings.positive(keyword)?.map(|s| Duration::from_secs(s.into())));
    let milliseconds = settings.positive("tcp_user_timeout")?;
    let require_auth = settings.text("require_auth").map(|text| {
        RequireAuth::parse(text)
            .map_err(|expected| settings.invalid("require_auth", text, expected))
    });
    Ok(ConnInfo {
        hosts,
        user: user.ok_or(ConnInfoError::NoUser)?,
        dbname: settings.owned("dbname"),
        password: settings.text("password").map(Secret::new),
        passfile: settings.path("passfile").or_else(home_passfile),
        application_name: name.and_then(|keyword| settings.owned(keyword)),
        options: settings.owned("options"),
        connect_timeout: seconds("connect_timeout")?,
        keepalives: settings.integer("keepalives")?.is_none_or(|number| number != 0),
        keepalives_idle: seconds("keepalives_idle")?,
        keepalives_interval: seconds("keepalives_interval")?,
        keepalives_count: settings.positive("keepalives_count")?,
        tcp_user_timeout: milliseconds.map(|ms| Duration::from_millis(ms.into())),
        ssl_mode,
        ssl_negotiation: ssl_negotiation(settings, ssl_mode)?,
        ssl_root_cert: root,
        ssl_cert,
        ssl_key,
        ssl_crl: settings.path("sslcrl").or_else(|| surroundings.existing_ssl_file("root.crl")),
        ssl_sni: settings.choice("sslsni", &[("0", false), ("1", true)], true)?,
        ssl_min_protocol_version: ssl_min,
        ssl_max_protocol_version: ssl_max,
        channel_binding: settings.choice(
            "channel_binding",
            ChannelBinding::CHOICES,
            ChannelBinding::Prefer,
        )?,
        require_auth: require_auth.transpose()?,
        target_session_attrs: settings.choice(
            "target_session_attrs",
            TargetSessionAttrs::CHOICES,
            TargetSessionAttrs::Any,
        )?,
        load_balance_hosts: settings.choice(
            "load_balance_hosts",
            LoadBalance::CHOICES,
            LoadBalance::Disable,
        )?,
    })
}

/// Puts the lists of hosts, addresses and ports together.
fn hosts(settings: &Settings, default: &Path) -> Result<Vec<HostSpec>, ConnInfoError> {
    let [names, addresses, ports] = ["host", "hostaddr", "port"].map(|list| settings.list(list));
    let count = if addresses.is_empty() { names.len().max(1) } else { addresses.len() };
    if !names.is_empty() && names.len() != count {
        return Err(ConnInfoError::Conflict(format!(
            "host lists {} names and hostaddr {count} addresses: give one address for each name; \
             it may be empty",
            names.len()
        )));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(ConnInfoError::Conflict(format!(
            "port lists {} numbers for {count} hosts: give one for all or one for each",
            ports.len()
        )));
    }
    let mut hosts = Vec::new();
    for index in 0..count {
        let address = addresses.get(index).copied().unwrap_or("");
        let name = names.get(index).copied().filter(|name| !name.is_empty());
        let port =
            if let [port] = ports[..] { port } else { ports.get(index).copied().unwrap_or("") };
        let hostaddr = match address {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                settings.invalid("hostaddr", text, "an IPv4 or IPv6 address; names go into host")
            })?),
        };
        let host = match name.unwrap_or(address) {
            "" => Host::Unix(default.to_owned()),
            name if name.starts_with(['/', '@']) => Host::Unix(name.into()),
            name if name.contains(|c: char| "=;@".contains(c) || is_space(c)) => {
                let expected = "a host name or a directory; a space ends each keyword=value";
                return Err(settings.invalid("host", name, expected));
            }
            name => Host::Tcp(name.to_owned()),
        };
        let number = if port.is_empty() {
            Some(DEFAULT_PORT)
        } else {
            port.trim_matches(is_space).parse().ok()
        };
        // Never shown: in a URI with a stray slash it is the first half of the password.
        let port = number.filter(|&port| port > 0).ok_or_else(|| ConnInfoError::InvalidValue {
            keyword: "port",
            value: format!("of host {}", index + 1),
            origin: settings.origin("port"),
            expected: "a number from 1 to 65535 (in a URI, write %2F for \"/\" in a password)"
                .to_owned(),
        })?;
        hosts.push(HostSpec { host, hostaddr, port });
    }
    Ok(hosts)
}

/// Refuses what was asked for and cannot be given.
fn refuse_unsupported(settings: &Settings, hosts: &[HostSpec]) -> Result<(), ConnInfoError> {
    let refuse = |keyword, name: &'static str, advice| {
        let origin = settings.origin(keyword);
        Err(ConnInfoError::Unsupported { keyword: name, origin, advice })
    };
    for &(keyword, _, handling) in KEYWORDS {
        if let (Handling::Refused(advice), Some(_)) = (handling, settings.text(keyword)) {
            return refuse(keyword, keyword, advice);
        }
    }
    let gss = [("disable", false), ("prefer", false), ("require", true)];
    if settings.choice("gssencmode", &gss, false)? {
        let advice = "pgkeep has no Kerberos encryption; use sslmode=verify-full";
        return refuse("gssencmode", "gssencmode=require", advice);
    }
    let versions = [("3.0", false), ("3.2", true), ("latest", true)];
    settings.choice("max_protocol_version", &versions, true)?;
    if settings.choice("min_protocol_version", &versions, false)? {
        let advice = "pgkeep speaks version 3.0; leave it out";
        return refuse("min_protocol_version", "min_protocol_version above 3.0", advice);
    }
    let uses_sockets = hosts.iter().any(|host| host.socket_path().is_some());
    if uses_sockets && settings.text("requirepeer").is_some() {
        let advice = "keep others out of the socket's directory instead";
        return refuse("requirepeer", "requirepeer", advice);
    }
    Ok(())
}
