//! The stores: a folder and real servers, each behind a proxy.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::{HttpRequest, HttpRequestBody};
use pgkeep::store::{Region, RegionSpec, open_region};

use crate::process::{Folder, Spawned, cache, free_port, program, user_command, wait_until};
use crate::proxy::Proxy;

pub const KEY: &str = "test-key";
pub const SECRET: &str = "test-secret";
pub const BUCKET: &str = "archive";
/// The account that every Azurite has, with the key that is printed in its documentation.
const AZURITE_ACCOUNT: &str = "devstoreaccount1";
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// What becomes of a request to create an object only if it is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    Honoured,
    /// The object is overwritten.
    Ignored,
    /// The request fails.
    Refused,
}

pub struct Store {
    pub name: &'static str,
    pub creation: Creation,
    /// Why uploads in parts cannot be tried, if they cannot.
    pub no_parts: Option<&'static str>,
    /// Why pages of listings cannot be seen, if they cannot.
    pub no_pages: Option<&'static str>,
    pub spec: RegionSpec,
    pub proxy: Option<Proxy>,
    _process: Option<Spawned>,
    pub folder: Folder,
}

impl Store {
    pub fn region(&self) -> Region {
        open_region(&self.spec).unwrap()
    }
}

pub fn spec(url: &str, options: &[(&str, String)]) -> RegionSpec {
    let options = options.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
    RegionSpec { name: "eu".into(), url: url.into(), options: options.collect() }
}

pub fn s3_spec(port: u16, bucket: &str, key: &str, secret: &str) -> RegionSpec {
    let options = [
        ("endpoint", format!("http://127.0.0.1:{port}")),
        ("access_key_id", key.to_owned()),
        ("secret_access_key", secret.to_owned()),
        ("region", "us-east-1".to_owned()),
    ];
    spec(&format!("s3://{bucket}/prod"), &options)
}

pub fn folder() -> Store {
    let folder = Folder::new();
    let path = folder.make("region");
    let spec = spec(&format!("file://{}", path.display()), &[]);
    let creation = Creation::Honoured;
    Store {
        name: "folder",
        creation,
        no_parts: None,
        no_pages: Some("a folder has none"),
        spec,
        proxy: None,
        _process: None,
        folder,
    }
}

/// Waits until the region can be listed.
fn opened(store: Store) -> Store {
    let region = store.region();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    wait_until(store.name, || runtime.block_on(region.list("probe")).is_ok());
    store
}

pub fn seaweedfs() -> Store {
    let folder = Folder::new();
    let (port, data) = (free_port(), folder.make("s3"));
    let mut command = user_command(program("bin/seaweedfs-s3"));
    command.arg(port.to_string()).arg(&data).arg(format!("-bucket={BUCKET}"));
    command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET);
    command.env("HOME", &data).current_dir(&data);
    let process = Some(Spawned::start(command, &folder.path().join("s3.log")));
    let proxy = Proxy::start(port);
    let spec = s3_spec(proxy.port, BUCKET, KEY, SECRET);
    let creation = Creation::Honoured;
    opened(Store {
        name: "SeaweedFS",
        creation,
        no_parts: None,
        no_pages: None,
        spec,
        proxy: Some(proxy),
        _process: process,
        folder,
    })
}

pub fn moto(name: &'static str) -> Store {
    let folder = Folder::new();
    let port = free_port();
    // Its interpreter may be one that only this user can read.
    let mut command = Command::new(program("bin/moto_server"));
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).current_dir("/");
    let process = Spawned::start(command, &folder.path().join("moto.log"));
    wait_until(name, || http(port, "PUT", &format!("/{BUCKET}"), &[], "").is_some_and(is_success));
    let proxy = Proxy::start(port);
    let spec = s3_spec(proxy.port, BUCKET, KEY, SECRET);
    let creation = Creation::Honoured;
    opened(Store {
        name,
        creation,
        no_parts: None,
        no_pages: None,
        spec,
        proxy: Some(proxy),
        _process: Some(process),
        folder,
    })
}

/// Moto checks no signatures, so a proxy may take a signed header away.
pub fn moto_that_ignores_conditions() -> Store {
    let mut store = moto("moto behind a proxy that drops conditions");
    store.proxy.as_ref().unwrap().plan.ignore_conditions.store(true, SeqCst);
    store.creation = Creation::Ignored;
    store
}

pub fn moto_that_refuses_conditions() -> Store {
    let mut store = moto("moto behind a proxy that refuses conditions");
    store.proxy.as_ref().unwrap().plan.refuse_conditions.store(true, SeqCst);
    store.creation = Creation::Refused;
    store
}

pub fn fake_gcs() -> Store {
    let folder = Folder::new();
    let port = free_port();
    let proxy = Proxy::start(port);
    proxy.plan.as_signed_url.store(true, SeqCst);
    let mut command = user_command(program("bin/fake-gcs-server"));
    command.args(["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]);
    command.args(["-log-level", "error", "-port", &port.to_string()]);
    command.args(["-public-host", &format!("127.0.0.1:{}", proxy.port)]).current_dir("/");
    let process = Spawned::start(command, &folder.path().join("gcs.log"));
    let body = format!("{{\"name\": \"{BUCKET}\"}}");
    wait_until("fake-gcs-server", || {
        http(port, "POST", "/storage/v1/b?project=test", &[], &body).is_some_and(is_success)
    });
    let endpoint = format!("http://127.0.0.1:{}", proxy.port);
    let account = "{\"private_key\": \"\", \"private_key_id\": \"\", \"client_email\": \"\", \"disable_oauth\": true}";
    let options = [("base_url", endpoint), ("google_service_account_key", account.to_owned())];
    let spec = spec(&format!("gs://{BUCKET}/prod"), &options);
    opened(Store {
        name: "fake-gcs-server",
        // Unlike Google's own.
        creation: Creation::Ignored,
        no_parts: Some("fake-gcs-server knows no uploads in parts by the XML interface"),
        no_pages: Some("fake-gcs-server lists everything in one page"),
        spec,
        proxy: Some(proxy),
        _process: Some(process),
        folder,
    })
}

pub fn azurite() -> Store {
    let folder = Folder::new();
    let port = free_port();
    let mut command = user_command(program("bin/azurite-blob"));
    command.args(["--blobPort", &port.to_string(), "--inMemoryPersistence", "--silent"]);
    command.args(["--skipApiVersionCheck"]).current_dir(folder.path());
    command.env("HOME", folder.path());
    let process = Spawned::start(command, &folder.path().join("azurite.log"));
    let path = format!("/{AZURITE_ACCOUNT}/{BUCKET}?restype=container");
    wait_until("azurite", || {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = "PUT".parse().unwrap();
        *request.uri_mut() = format!("http://127.0.0.1:{port}{path}").parse().unwrap();
        let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(AZURITE_KEY).unwrap());
        let authorizer = AzureAuthorizer::new(&credential, AZURITE_ACCOUNT);
        authorizer.try_authorize(&mut request).unwrap();
        let headers: Vec<(String, String)> = request
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        http(port, "PUT", &path, &headers, "").is_some_and(is_success)
    });
    let proxy = Proxy::start(port);
    let options = [
        ("endpoint", format!("http://127.0.0.1:{}/{AZURITE_ACCOUNT}", proxy.port)),
        ("account_name", AZURITE_ACCOUNT.to_owned()),
        ("account_key", AZURITE_KEY.to_owned()),
    ];
    let spec = spec(&format!("az://{BUCKET}/prod"), &options);
    opened(Store {
        name: "Azurite",
        creation: Creation::Honoured,
        no_parts: None,
        no_pages: Some("a page holds 5,000 objects"),
        spec,
        proxy: Some(proxy),
        _process: Some(process),
        folder,
    })
}

/// A single node. It takes ten minutes to build, so `scripts/setup --all` gets it and
/// `PGKEEP_TEST_ALL=1` wants it.
pub fn garage() -> Result<Store, String> {
    let garage = cache().join("bin/garage");
    if !garage.exists() {
        let reason = "garage is not there; scripts/setup --all builds it";
        assert!(std::env::var_os("PGKEEP_TEST_ALL").is_none(), "{reason}");
        return Err(reason.to_owned());
    }
    let folder = Folder::new();
    let (rpc, port) = (free_port(), free_port());
    let data = folder.make("garage");
    let config = folder.write(
        "garage.toml",
        &format!(
            "metadata_dir = \"{0}/meta\"\ndata_dir = \"{0}/data\"\ndb_engine = \"sqlite\"\n\
             replication_factor = 1\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\n\
             rpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{1}\"\n\
             [s3_api]\ns3_region = \"us-east-1\"\napi_bind_addr = \"127.0.0.1:{port}\"\n",
            data.display(),
            "1f".repeat(32)
        ),
    );
    let mut command = user_command(&garage);
    command.arg("-c").arg(&config).arg("server").current_dir("/");
    let process = Spawned::start(command, &folder.path().join("garage.log"));
    let ask = |words: &[&str]| {
        let mut command = user_command(&garage);
        command.arg("-c").arg(&config).args(words).current_dir("/");
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        output.status.success().then_some(text)
    };
    let told = |words: &[&str]| ask(words).unwrap_or_else(|| panic!("garage {words:?} failed"));
    wait_until("garage", || ask(&["status"]).is_some());
    let node = told(&["node", "id", "-q"]);
    let node = node.split('@').next().unwrap();
    told(&["layout", "assign", "-z", "here", "-c", "1G", &node[..16]]);
    told(&["layout", "apply", "--version", "1"]);
    wait_until("garage's layout", || ask(&["bucket", "create", BUCKET]).is_some());
    let key = told(&["key", "create", "pgkeep"]);
    let field = |name: &str| {
        let line = key.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    told(&["bucket", "allow", "--read", "--write", "--owner", BUCKET, "--key", "pgkeep"]);
    let proxy = Proxy::start(port);
    let spec = s3_spec(proxy.port, BUCKET, &field("Key ID"), &field("Secret key"));
    Ok(opened(Store {
        name: "Garage",
        creation: Creation::Ignored,
        no_parts: None,
        no_pages: None,
        spec,
        proxy: Some(proxy),
        _process: Some(process),
        folder,
    }))
}

/// Sends a plain request; the status code of the answer.
fn http(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(String, String)],
    body: &str,
) -> Option<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let headers: String =
        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {}\r\n\
         Connection: close\r\n{headers}\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split(' ').nth(1)?.parse().ok()
}

fn is_success(status: u16) -> bool {
    (200..300).contains(&status)
}

/// How many files lie below a folder.
pub fn files_in(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries.map(|entry| if entry.path().is_dir() { files_in(&entry.path()) } else { 1 }).sum()
}
