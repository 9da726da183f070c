//! The keywords that take one of a few words, each an enum whose variants know libpq's spelling,
//! and `require_auth`, which takes a list of such words.

use std::fmt;

use super::print::list;

/// Declares the values of one keyword, in libpq's spelling.
macro_rules! choices {
    (
        $(#[$meta:meta])*
        $name:ident { $($(#[$about:meta])* $variant:ident = $text:literal),+ $(,)? }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$about])* $variant),+ }

        impl $name {
            pub(super) const CHOICES: &'static [(&'static str, $name)] = &[$(($text, $name::$variant)),+];

            /// libpq's spelling of it.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }
    };
}

choices! {
    /// `sslmode`, from weakest to strongest. Unix sockets never use TLS, whatever it says.
    SslMode {
        /// Never TLS.
        Disable = "disable",
        /// TLS only if the server refuses a connection without.
        Allow = "allow",
        /// TLS if the server has it.
        Prefer = "prefer",
        /// TLS; checks the server's certificate only if there is a root certificate.
        Require = "require",
        /// TLS, and a certificate that a known root vouches for.
        VerifyCa = "verify-ca",
        /// The same, made out to the host's name.
        VerifyFull = "verify-full",
    }
}

choices! {
    /// `sslnegotiation`: how TLS begins.
    SslNegotiation {
        /// After PostgreSQL's own request for it.
        Postgres = "postgres",
        /// At once, announced by ALPN (PostgreSQL 17 and newer).
        Direct = "direct",
    }
}

choices! {
    /// A version of TLS that pgkeep speaks.
    TlsVersion {
        /// TLS 1.2.
        Tls12 = "TLSv1.2",
        /// TLS 1.3.
        Tls13 = "TLSv1.3",
    }
}

choices! {
    /// `channel_binding`: whether SCRAM is tied to the TLS connection.
    ChannelBinding {
        /// Never.
        Disable = "disable",
        /// If the server offers it.
        Prefer = "prefer",
        /// A server that does not prove itself so is refused.
        Require = "require",
    }
}

choices! {
    /// `target_session_attrs`: which of the hosts will do.
    TargetSessionAttrs {
        /// Any that answers.
        Any = "any",
        /// One whose sessions may write.
        ReadWrite = "read-write",
        /// One whose sessions may not write.
        ReadOnly = "read-only",
        /// One that is not in recovery.
        Primary = "primary",
        /// One in recovery.
        Standby = "standby",
        /// One in recovery if there is one, else any.
        PreferStandby = "prefer-standby",
    }
}

choices! {
    /// `load_balance_hosts`: the order in which hosts and their addresses are tried.
    LoadBalance {
        /// As given.
        Disable = "disable",
        /// Shuffled.
        Random = "random",
    }
}

choices! {
    /// A way to authenticate, as `require_auth` names it.
    AuthMethod {
        /// The password in clear.
        Password = "password",
        /// The password as an MD5 hash.
        Md5 = "md5",
        /// Kerberos.
        Gss = "gss",
        /// Windows' own.
        Sspi = "sspi",
        /// SCRAM, with or without channel binding.
        ScramSha256 = "scram-sha-256",
        /// A bearer token.
        Oauth = "oauth",
        /// The server asked for nothing.
        None = "none",
    }
}

/// Which ways to authenticate the user allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequireAuth {
    methods: Vec<AuthMethod>,
    /// Whether the methods are the forbidden ones.
    negated: bool,
}

impl RequireAuth {
    /// Whether a server may authenticate us this way; [`AuthMethod::None`] asks whether it may let
    /// us in without.
    pub fn allows(&self, method: AuthMethod) -> bool {
        self.methods.contains(&method) != self.negated
    }

    pub(super) fn parse(text: &str) -> Result<RequireAuth, String> {
        let negated = text.starts_with('!');
        let mut methods = Vec::new();
        for word in text.split(',') {
            let name = match (word.strip_prefix('!'), negated) {
                (Some(name), true) => name,
                (None, false) => word,
                _ => return Err("either methods to allow or, each with a !, to forbid".to_owned()),
            };
            let method = find_choice(name, AuthMethod::CHOICES)
                .ok_or_else(|| format!("a list of {}", one_of(AuthMethod::CHOICES)))?;
            if methods.contains(&method) {
                return Err(format!("each method once, and {name} is there twice"));
            }
            methods.push(method);
        }
        Ok(RequireAuth { methods, negated })
    }
}

impl fmt::Display for RequireAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.negated { "!" } else { "" };
        f.write_str(&list(self.methods.iter().map(|method| format!("{sign}{}", method.as_str()))))
    }
}

/// The value that is spelled so; upper and lower case differ, as in libpq.
pub(super) fn find_choice<T: Copy>(text: &str, choices: &[(&str, T)]) -> Option<T> {
    choices.iter().find(|choice| choice.0 == text).map(|choice| choice.1)
}

/// The words to choose from, for an error.
pub(super) fn one_of<T>(choices: &[(&str, T)]) -> String {
    let names: Vec<&str> = choices.iter().map(|choice| choice.0).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.join(""),
    }
}
