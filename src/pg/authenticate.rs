//! Proving who this is: SCRAM, md5, cleartext over what nobody can listen to, peer, certificates
//! (PostgreSQL documentation, "Message Flow"; `src/backend/libpq/auth.c`).

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ChannelBinding as Binding, ScramSha256};
use postgres_protocol::message::{backend, frontend};

use super::conninfo::{AuthMethod, ChannelBinding};
use super::message::Incoming;
use super::{ConnInfo, Connection, PgError, Secret};

impl Connection {
    pub(super) async fn authenticate(
        &mut self,
        conninfo: &ConnInfo,
        binding: Option<Vec<u8>>,
        password: Option<&Secret>,
    ) -> Result<(), PgError> {
        let encrypted = self.socket().is_encrypted();
        let local = self.socket().is_local();
        let need_password = || {
            password.map(|secret| secret.expose().to_vec()).ok_or_else(|| {
                PgError::Authentication(
                    "the server asks for a password and none is given: set PGPASSWORD, passfile or ~/.pgpass".into(),
                )
            })
        };
        let binding_required = conninfo.channel_binding == ChannelBinding::Require;
        let allowed = |method: AuthMethod| match &conninfo.require_auth {
            Some(required) if !required.allows(method) => Err(PgError::Authentication(format!(
                "the server asks for {}, and require_auth={required} does not allow that",
                method.as_str()
            ))),
            _ => Ok(()),
        };
        let mut asked = false;
        loop {
            let message = match self.receive().await? {
                Incoming::Other(message) => message,
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(_) | Incoming::Parameter(..) => continue,
                _ => return Err(PgError::Protocol("no request for authentication".into())),
            };
            let answer = match message {
                backend::Message::AuthenticationOk if binding_required => {
                    return Err(PgError::Authentication(
                        "channel_binding=require, but the server did not authenticate with it"
                            .into(),
                    ));
                }
                backend::Message::AuthenticationOk => {
                    return if asked { Ok(()) } else { allowed(AuthMethod::None) };
                }
                backend::Message::AuthenticationSasl(body) => {
                    allowed(AuthMethod::ScramSha256)?;
                    let password = need_password()?;
                    self.scram(conninfo, &body, binding.clone(), &password).await?;
                    // The server's own proof was checked; what follows is AuthenticationOk.
                    return match self.receive().await? {
                        Incoming::Other(backend::Message::AuthenticationOk) => Ok(()),
                        Incoming::Error(error) => Err(PgError::Server(error)),
                        _ => Err(PgError::Protocol("authentication did not end".into())),
                    };
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    allowed(AuthMethod::Md5)?;
                    md5_hash(conninfo.user.as_bytes(), &need_password()?, body.salt()).into_bytes()
                }
                backend::Message::AuthenticationCleartextPassword if encrypted || local => {
                    allowed(AuthMethod::Password)?;
                    need_password()?
                }
                backend::Message::AuthenticationCleartextPassword => {
                    return Err(PgError::Authentication("the server asks for the password in clear text over an unencrypted connection; use sslmode=require or better, or scram-sha-256 in pg_hba.conf".into()));
                }
                _ => {
                    return Err(PgError::Authentication("the server asks for GSSAPI, SSPI or another method that pgkeep does not have; use scram-sha-256, a certificate or peer in pg_hba.conf".into()));
                }
            };
            asked = true;
            let mut output = BytesMut::new();
            frontend::password_message(&answer, &mut output)
                .map_err(|error| PgError::Protocol(error.to_string()))?;
            self.send(&output).await?;
        }
    }

    async fn scram(
        &mut self,
        conninfo: &ConnInfo,
        body: &backend::AuthenticationSaslBody,
        binding: Option<Vec<u8>>,
        password: &[u8],
    ) -> Result<(), PgError> {
        use fallible_iterator::FallibleIterator;
        let protocol = |error: std::io::Error| PgError::Protocol(error.to_string());
        let offered: Vec<String> =
            body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(protocol)?;
        let with_binding = offered.iter().any(|name| name == sasl::SCRAM_SHA_256_PLUS);
        let plain = offered.iter().any(|name| name == sasl::SCRAM_SHA_256);
        let wanted = conninfo.channel_binding;
        let (mechanism, binding) = match binding {
            Some(hash) if with_binding && wanted != ChannelBinding::Disable => {
                (sasl::SCRAM_SHA_256_PLUS, Binding::tls_server_end_point(hash))
            }
            _ if wanted == ChannelBinding::Require => {
                return Err(PgError::Authentication(
                    "channel_binding=require, but it is not to be had on this connection".into(),
                ));
            }
            Some(_) if plain && wanted != ChannelBinding::Disable => {
                (sasl::SCRAM_SHA_256, Binding::unrequested())
            }
            _ if plain => (sasl::SCRAM_SHA_256, Binding::unsupported()),
            _ => {
                return Err(PgError::Authentication(format!("the server offers only {offered:?}")));
            }
        };
        let failed = |error: std::io::Error| PgError::Authentication(error.to_string());
        let mut scram = ScramSha256::new(password, binding);
        let mut output = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut output)
            .map_err(protocol)?;
        self.send(&output).await?;
        loop {
            match self.receive().await? {
                Incoming::Other(backend::Message::AuthenticationSaslContinue(body)) => {
                    scram.update(body.data()).map_err(failed)?;
                    output.clear();
                    frontend::sasl_response(scram.message(), &mut output).map_err(protocol)?;
                    self.send(&output).await?;
                }
                Incoming::Other(backend::Message::AuthenticationSaslFinal(body)) => {
                    return scram.finish(body.data()).map_err(failed);
                }
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(_) => {}
                _ => return Err(PgError::Protocol("SCRAM was broken off".into())),
            }
        }
    }
}
