//! From settings to what they mean for TLS: whom to trust, what to show, how strict to be. Weak
//! combinations are refused, as in libpq.

use std::path::PathBuf;

use super::choices::{SslMode, SslNegotiation, TlsVersion};
use super::environment::Surroundings;
use super::error::ConnInfoError;
use super::settings::Settings;
use super::{HostSpec, SslRootCert};

/// Who vouches for the server, if anybody.
pub(super) fn root_certificate(
    settings: &Settings,
    surroundings: &Surroundings<'_>,
) -> Option<SslRootCert> {
    match settings.text("sslrootcert") {
        Some("system") => Some(SslRootCert::System),
        Some(path) => Some(SslRootCert::File(path.into())),
        None => surroundings.existing_ssl_file("root.crt").map(SslRootCert::File),
    }
}

/// `sslmode`, if it can do what it promises.
pub(super) fn ssl_mode(
    settings: &Settings,
    root: Option<&SslRootCert>,
    hosts: &[HostSpec],
) -> Result<SslMode, ConnInfoError> {
    let system = root == Some(&SslRootCert::System);
    let default = if system { SslMode::VerifyFull } else { SslMode::Prefer };
    let mode = settings.choice("sslmode", SslMode::CHOICES, default)?;
    if system && mode != SslMode::VerifyFull {
        return Err(ConnInfoError::Conflict(format!(
            "sslmode={}{} is too weak for sslrootcert=system, for which anybody can get a \
             certificate: use sslmode=verify-full",
            mode.as_str(),
            settings.origin("sslmode")
        )));
    }
    if mode >= SslMode::VerifyCa
        && root.is_none()
        && hosts.iter().any(|host| host.socket_path().is_none())
    {
        return Err(ConnInfoError::Conflict(format!(
            "sslmode={}{} needs a root certificate: name it with sslrootcert, put it at \
             ~/.postgresql/root.crt, or trust the system's with sslrootcert=system",
            mode.as_str(),
            settings.origin("sslmode")
        )));
    }
    Ok(mode)
}

/// `sslnegotiation`; direct TLS leaves no way back to a connection without.
pub(super) fn ssl_negotiation(
    settings: &Settings,
    mode: SslMode,
) -> Result<SslNegotiation, ConnInfoError> {
    let default = SslNegotiation::Postgres;
    let negotiation = settings.choice("sslnegotiation", SslNegotiation::CHOICES, default)?;
    if negotiation == SslNegotiation::Direct && mode < SslMode::Require {
        return Err(ConnInfoError::Conflict(format!(
            "sslmode={} is too weak for sslnegotiation=direct{}: use require, verify-ca or \
             verify-full",
            mode.as_str(),
            settings.origin("sslnegotiation")
        )));
    }
    Ok(negotiation)
}

/// The lowest and the highest version of TLS.
pub(super) fn tls_versions(settings: &Settings) -> Result<(TlsVersion, TlsVersion), ConnInfoError> {
    let version = |keyword, default| {
        let Some(text) = settings.text(keyword) else { return Ok(default) };
        let is_named = |name: &str| name.eq_ignore_ascii_case(text);
        let choice = TlsVersion::CHOICES.iter().find(|choice| is_named(choice.0));
        let is_old = ["TLSv1", "TLSv1.1"].into_iter().any(is_named);
        match choice {
            Some(choice) => Ok(choice.1),
            // Older ones are allowed, and never used.
            None if is_old && keyword == "ssl_min_protocol_version" => Ok(TlsVersion::Tls12),
            None if is_old => Err(ConnInfoError::Unsupported {
                keyword: "ssl_max_protocol_version below TLSv1.2",
                origin: settings.origin(keyword),
                advice: "pgkeep speaks TLSv1.2 and TLSv1.3",
            }),
            None => Err(settings.invalid(keyword, text, "TLSv1.2 or TLSv1.3")),
        }
    };
    let min = version("ssl_min_protocol_version", TlsVersion::Tls12)?;
    let max = version("ssl_max_protocol_version", TlsVersion::Tls13)?;
    if min > max {
        let problem = "ssl_min_protocol_version is above ssl_max_protocol_version";
        return Err(ConnInfoError::Conflict(problem.to_owned()));
    }
    Ok((min, max))
}

/// The certificate to show and its key.
pub(super) fn client_certificate(
    settings: &Settings,
    surroundings: &Surroundings<'_>,
) -> Result<(Option<PathBuf>, Option<PathBuf>), ConnInfoError> {
    let modes = [("disable", Some(false)), ("allow", Some(true)), ("require", None)];
    let Some(may_show) = settings.choice("sslcertmode", &modes, Some(true))? else {
        return Err(ConnInfoError::Unsupported {
            keyword: "sslcertmode=require",
            origin: settings.origin("sslcertmode"),
            advice: "demand the certificate in the server's pg_hba.conf, with clientcert",
        });
    };
    let default = || surroundings.existing_ssl_file("postgresql.crt");
    let certificate = settings.path("sslcert").or_else(default).filter(|_| may_show);
    // The default key need not exist: better to fail on a missing key than to leave out the
    // certificate.
    let key = settings.path("sslkey").or_else(|| surroundings.ssl_file("postgresql.key"));
    let key = key.filter(|_| certificate.is_some());
    Ok((certificate, key))
}
