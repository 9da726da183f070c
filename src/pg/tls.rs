//! TLS as libpq means it: `sslmode` decides what is verified (PostgreSQL documentation, "SSL
//! Support", table "SSL Mode Descriptions").
//!
//! - `require` without a root certificate: encrypted, nobody verified; with one, as `verify-ca`.
//! - `verify-ca`: the certificate must be signed by a trusted authority.
//! - `verify-full`: and it must name the host that was asked for.
//!
//! A certificate that is itself in the root file is trusted, as OpenSSL does: many servers run
//! with one self-signed certificate.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::der::Decode;

use super::conninfo::{SslNegotiation, SslRootCert, TlsVersion};
use super::{ConnInfo, PgError, SslMode};

/// The name of PostgreSQL's protocol for ALPN (PostgreSQL documentation, "SSL Session Encryption").
const ALPN_PROTOCOL: &[u8] = b"postgresql";

/// Shakes hands over a connected socket.
///
/// # Errors
/// Files that cannot be read, a server that is not trusted, a handshake that fails.
pub(super) async fn handshake(
    stream: TcpStream,
    host: &str,
    conninfo: &ConnInfo,
) -> Result<TlsStream<TcpStream>, PgError> {
    let config = client_config(conninfo).map_err(PgError::Tls)?;
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| PgError::Tls(format!("{host:?} cannot be a name in a certificate")))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| PgError::Tls(format!("the handshake with {host} failed: {error}")))?;
    // Without a request for TLS in PostgreSQL's own protocol nothing else proves that the other
    // side speaks it, and not, say, HTTP.
    if conninfo.ssl_negotiation == SslNegotiation::Direct
        && stream.get_ref().1.alpn_protocol() != Some(ALPN_PROTOCOL)
    {
        return Err(PgError::Tls(format!(
            "{host} did not agree to speak PostgreSQL's protocol (ALPN), which sslnegotiation=direct demands"
        )));
    }
    Ok(stream)
}

fn client_config(conninfo: &ConnInfo) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Verifier::new(conninfo, provider.clone())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(protocol_versions(conninfo))
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match (&conninfo.ssl_cert, &conninfo.ssl_key) {
        (Some(certificate), Some(key)) => builder
            .with_client_auth_cert(read_certificates(certificate)?, read_key(key)?)
            .map_err(|error| format!("client certificate {}: {error}", certificate.display()))?,
        (Some(certificate), None) => {
            return Err(format!("sslcert {} has no sslkey", certificate.display()));
        }
        _ => builder.with_no_client_auth(),
    };
    config.enable_sni = conninfo.ssl_sni;
    if conninfo.ssl_negotiation == SslNegotiation::Direct {
        config.alpn_protocols = vec![ALPN_PROTOCOL.to_vec()];
    }
    Ok(config)
}

fn protocol_versions(conninfo: &ConnInfo) -> &'static [&'static SupportedProtocolVersion] {
    let (min, max) = (conninfo.ssl_min_protocol_version, conninfo.ssl_max_protocol_version);
    static OLD: &[&SupportedProtocolVersion] = &[&TLS12];
    static BOTH: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
    static NEW: &[&SupportedProtocolVersion] = &[&TLS13];
    match (min, max) {
        (TlsVersion::Tls12, TlsVersion::Tls12) => OLD,
        (TlsVersion::Tls12, TlsVersion::Tls13) => BOTH,
        (TlsVersion::Tls13, _) => NEW,
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let problem =
        |error: &dyn std::fmt::Display| format!("certificate {}: {error}", path.display());
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| problem(&error))?.collect();
    match found {
        Ok(certificates) if certificates.is_empty() => Err(problem(&"the file holds none")),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(problem(&error)),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| format!("key {}: {error}", path.display()))
}

/// How much of the server's certificate is verified.
#[derive(Debug)]
enum Trust {
    /// Nothing.
    Anybody,
    /// The chain, and with `check_name` the host's name.
    Chain {
        inner: Arc<WebPkiServerVerifier>,
        pinned: Vec<CertificateDer<'static>>,
        check_name: bool,
    },
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(conninfo: &ConnInfo, provider: Arc<CryptoProvider>) -> Result<Verifier, String> {
        let verified = matches!(conninfo.ssl_mode, SslMode::VerifyCa | SslMode::VerifyFull);
        let trust = match &conninfo.ssl_root_cert {
            None if verified => {
                return Err("sslmode verify-ca and verify-full need a root certificate: set sslrootcert, or put it into ~/.postgresql/root.crt, or use sslrootcert=system".into());
            }
            None => Trust::Anybody,
            Some(roots) => {
                let check_name = conninfo.ssl_mode == SslMode::VerifyFull;
                chain_trust(roots, conninfo.ssl_crl.as_deref(), check_name, &provider)?
            }
        };
        Ok(Verifier { trust, provider })
    }
}

fn chain_trust(
    roots: &SslRootCert,
    revoked: Option<&Path>,
    check_name: bool,
    provider: &Arc<CryptoProvider>,
) -> Result<Trust, String> {
    let mut store = RootCertStore::empty();
    let pinned = match roots {
        SslRootCert::System => {
            let found = rustls_native_certs::load_native_certs();
            store.add_parsable_certificates(found.certs);
            Vec::new()
        }
        SslRootCert::File(path) => {
            let certificates = read_certificates(path)?;
            store.add_parsable_certificates(certificates.clone());
            certificates
        }
    };
    if store.is_empty() {
        return Err("no usable root certificate was found".into());
    }
    let mut builder =
        WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone());
    if let Some(path) = revoked {
        let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_file_iter(path)
            .and_then(Iterator::collect)
            .map_err(|error| format!("sslcrl {}: {error}", path.display()));
        builder = builder.with_crls(lists?);
    }
    let inner = builder.build().map_err(|error| error.to_string())?;
    Ok(Trust::Chain { inner, pinned, check_name })
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Trust::Chain { inner, pinned, check_name } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        if pinned.iter().any(|certificate| certificate == end_entity) {
            if *check_name {
                let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&parsed, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match inner.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
            // The name is checked last: the chain is good.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !check_name => Ok(ServerCertVerified::assertion()),
            outcome => outcome,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The `tls-server-end-point` channel binding (RFC 5929, section 4.1): the certificate hashed with
/// the hash of its own signature, SHA-256 where that is MD5 or SHA-1. `None` for signatures that
/// have no such hash (Ed25519).
pub(super) fn channel_binding(stream: &TlsStream<TcpStream>) -> Option<Vec<u8>> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let parsed = x509_cert::Certificate::from_der(certificate).ok()?;
    // RFC 8017 appendix C and RFC 5758: sha1/256/384/512WithRSAEncryption, ecdsa-with-SHA1/256/384/512.
    Some(match parsed.signature_algorithm().oid.to_string().as_str() {
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Sha256::digest(certificate).to_vec(),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Sha384::digest(certificate).to_vec(),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Sha512::digest(certificate).to_vec(),
        _ => return None,
    })
}
