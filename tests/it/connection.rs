//! Ways to a server: TLS, SCRAM, sockets, host lists, and what is said when they fail.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use pgkeep::pg::{
    Addresses, ConnInfo, Connector, Dial, Dialed, HostSpec, Network, OpenSocket, Surroundings,
};

use crate::support::{
    Folder, Keeper, Server, ServerOptions, Spawned, free_port, program, user_command, wait_until,
};

/// A certificate authority and a server certificate for `localhost`.
struct Certificates {
    root: PathBuf,
    other_root: PathBuf,
}

fn openssl(folder: &Folder, arguments: &str) {
    let mut command = user_command(program("bin/openssl"));
    command.args(arguments.split(' ')).current_dir(folder.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn certificates(folder: &Folder) -> Certificates {
    for (name, subject) in [("root", "/CN=test-root"), ("other", "/CN=other-root")] {
        openssl(
            folder,
            &format!(
                "req -new -x509 -nodes -days 30 -newkey rsa:2048 -subj {subject} -keyout {name}.key -out {name}.crt"
            ),
        );
    }
    folder.write("names.ext", "subjectAltName=DNS:localhost\n");
    openssl(
        folder,
        "req -new -nodes -newkey rsa:2048 -subj /CN=localhost -keyout server.key -out server.csr",
    );
    openssl(
        folder,
        "x509 -req -days 30 -in server.csr -CA root.crt -CAkey root.key -CAcreateserial -extfile names.ext -out server.crt",
    );
    Certificates {
        root: folder.path().join("root.crt"),
        other_root: folder.path().join("other.crt"),
    }
}

/// A server that lets in only over TLS with SCRAM, and the tests' own connections by its socket.
fn strict_server(folder: &Folder, major: u32) -> Server {
    let at = |name: &str| folder.path().join(name).display().to_string();
    let options = ServerOptions {
        settings: format!(
            "ssl = on\nssl_cert_file = '{}'\nssl_key_file = '{}'\npassword_encryption = 'scram-sha-256'",
            at("server.crt"),
            at("server.key")
        ),
        hba: Some(
            "local all postgres trust\n\
             hostssl all pgkeep 127.0.0.1/32 scram-sha-256\n\
             hostssl replication pgkeep 127.0.0.1/32 scram-sha-256\n\
             hostssl all plain 127.0.0.1/32 scram-sha-256\n\
             hostssl replication plain 127.0.0.1/32 scram-sha-256\n\
             hostssl all md5er 127.0.0.1/32 md5\n\
             hostssl replication md5er 127.0.0.1/32 md5\n"
                .into(),
        ),
        ..ServerOptions::default()
    };
    let server = Server::new(folder, major, &options);
    server.sql("CREATE ROLE pgkeep LOGIN REPLICATION PASSWORD 'right'; GRANT pg_monitor TO pgkeep");
    server.sql("CREATE ROLE plain LOGIN PASSWORD 'right'");
    server.sql(
        "SET password_encryption = 'md5'; CREATE ROLE md5er LOGIN REPLICATION PASSWORD 'right'",
    );
    server
}

const REGION: &str = "[[region]]\nname = \"eu\"\nurl = \"file:///tmp\"\n";

#[test]
fn tls_and_scram_are_as_strict_as_asked_for() {
    let folder = Folder::new();
    let certificates = certificates(&folder);
    let server = strict_server(&folder, 17);
    let url = format!("file://{}", folder.make("region-eu").display());
    let region = REGION.replace("file:///tmp", &url);
    let base = format!("host=localhost port={} user=pgkeep dbname=postgres", server.port);
    let root = certificates.root.display();
    let other = certificates.other_root.display();
    let check = |conninfo: String, password: &str| {
        let mut keeper = Keeper::with(&folder, &conninfo, &region);
        keeper.set_environment("PGPASSWORD", password);
        keeper.run(&["check"])
    };
    for good in [
        format!("{base} sslmode=verify-full sslrootcert={root}"),
        format!("{base} sslmode=verify-full sslrootcert={root} channel_binding=require"),
        format!("{base} sslmode=verify-ca sslrootcert={root} hostaddr=127.0.0.1"),
        format!("{base} sslmode=require"),
        format!("{base} sslmode=prefer"),
        format!("{base} sslmode=require sslnegotiation=direct"),
        base.replace("pgkeep", "md5er"),
    ] {
        let output = check(good.clone(), "right");
        assert!(
            output.stdout.contains("ok       replication connection"),
            "{good}\n{}",
            output.stdout
        );
        assert!(output.stdout.contains("ok       SQL connection"), "{good}\n{}", output.stdout);
    }
    let strict = format!("{base} sslmode=verify-full sslrootcert={root}");
    for (bad, password, words) in [
        (strict.clone(), "wr0ng-w0rd", ["password authentication failed", "~/.pgpass"]),
        (
            format!("{base} sslmode=verify-full sslrootcert={other}"),
            "right",
            ["UnknownIssuer", "sslrootcert must name"],
        ),
        (
            strict.replace("host=localhost", "host=127.0.0.1"),
            "right",
            ["not valid for", "one of the names"],
        ),
        (format!("{base} sslmode=disable"), "right", ["no pg_hba.conf entry", "host replication"]),
        (
            strict.replace("user=pgkeep", "user=plain"),
            "right",
            ["WAL sender", "ALTER ROLE pgkeep REPLICATION"],
        ),
        (
            strict.replace("user=pgkeep", "user=md5er") + " channel_binding=require",
            "right",
            ["channel_binding=require", "did not authenticate"],
        ),
        (strict.clone() + " require_auth=md5", "right", ["scram-sha-256", "require_auth"]),
    ] {
        let output = check(bad.clone(), password).expect(1);
        let text = output.stdout.clone() + &output.stderr;
        for word in words {
            assert!(text.contains(word), "{bad}: {word:?} is not in\n{text}");
        }
        assert!(!text.contains(password) || password == "right", "the password is printed");
    }
}

// The whole way, not only a check.
#[test]
fn wal_streams_over_tls_with_a_password_file() {
    let folder = Folder::new();
    let certificates = certificates(&folder);
    let server = strict_server(&folder, 16);
    let url = format!("file://{}", folder.make("region-eu").display());
    let conninfo = format!(
        "postgresql://pgkeep@localhost:{}/postgres?sslmode=verify-full&sslrootcert={}",
        server.port,
        certificates.root.display()
    );
    let mut keeper = Keeper::with(&folder, &conninfo, &REGION.replace("file:///tmp", &url));
    folder.write(".pgpass", &format!("localhost:{}:*:pgkeep:right\n", server.port));
    keeper.start();
    keeper.backup();
    server.sql("CREATE TABLE t AS SELECT 42 AS n");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    let mut copy = keeper.restore_and_start(&folder, 16, "copy", &["--tablespace-map", "a=b"][..0]);
    copy.wait_until_writable();
    assert!(!keeper.log().contains("right"), "the password was logged");
}

#[test]
fn the_first_host_of_a_list_may_be_down_or_a_standby() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let dead = free_port();
    let conninfo = format!(
        "host=127.0.0.1,{} port={dead},{} user=postgres dbname=postgres target_session_attrs=read-write",
        server.socket.display(),
        server.port
    );
    let url = format!("file://{}", folder.make("region-eu").display());
    let mut keeper = Keeper::with(&folder, &conninfo, &REGION.replace("file:///tmp", &url));
    keeper.start();
    server.sql("CREATE TABLE t AS SELECT 1");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
}

#[test]
fn a_server_without_replication_is_told_what_to_change() {
    let folder = Folder::new();
    let options = ServerOptions {
        settings: "wal_level = minimal\nmax_wal_senders = 0".into(),
        ..ServerOptions::default()
    };
    for major in [13, 18] {
        let folder_of_major = Folder::new();
        let server = Server::new(&folder_of_major, major, &options);
        let keeper = Keeper::new(&folder, &server, &["eu"]);
        let output = keeper.run(&["check"]).expect(1);
        assert!(output.stdout.contains("set wal_level = replica"), "{}", output.stdout);
        let output = keeper.run(&["run"]).expect(1);
        assert!(output.stderr.contains("set wal_level = replica"), "{}", output.stderr);
    }
}

/// A name for several addresses, of which the first takes connections and never answers.
struct ManyAddresses {
    addresses: Vec<HostSpec>,
    silent: Mutex<Vec<tokio::io::DuplexStream>>,
}

impl Dial for ManyAddresses {
    fn addresses<'a>(&'a self, _: &'a HostSpec) -> Addresses<'a> {
        Box::pin(std::future::ready(Ok(self.addresses.clone())))
    }

    fn dial<'a>(&'a self, conninfo: &'a ConnInfo, host: &'a HostSpec, tls: bool) -> Dialed<'a> {
        if *host != self.addresses[0] {
            return Network.dial(conninfo, host, tls);
        }
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        self.silent.lock().unwrap().push(theirs);
        Box::pin(std::future::ready(Ok(Some(OpenSocket::over(ours)))))
    }
}

// A name may stand for all servers of a cluster: one that hangs or has the wrong role must not use
// up the time of the others.
#[test]
fn every_address_of_a_name_has_its_own_attempt() {
    let folder = Folder::new();
    let read_only = ServerOptions {
        settings: "default_transaction_read_only = on".into(),
        ..ServerOptions::default()
    };
    let other_folder = Folder::new();
    let wrong = Server::new(&other_folder, 13, &read_only);
    let right = Server::new(&folder, 17, &ServerOptions::default());
    let text = "host=cluster.invalid user=postgres dbname=postgres connect_timeout=2 target_session_attrs=read-write";
    let conninfo = ConnInfo::parse(text, &Surroundings::from_process()).unwrap();
    let at = |port: u16| HostSpec {
        hostaddr: Some("127.0.0.1".parse().unwrap()),
        port,
        ..conninfo.hosts[0].clone()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dial = |ports: &[u16]| ManyAddresses {
        addresses: ports.iter().map(|port| at(*port)).collect(),
        silent: Mutex::default(),
    };
    let connector = |ports: &[u16]| Connector::with_dial(conninfo.clone(), Arc::new(dial(ports)));
    runtime.block_on(async {
        let all = connector(&[1, wrong.port, right.port]);
        let connection = all.connect(&[]).await.unwrap();
        assert_eq!(connection.host(), &at(right.port));
        assert_eq!(all.first_sql().await.unwrap().host(), &at(right.port));
        let error = connector(&[1, wrong.port]).connect(&[]).await.unwrap_err().to_string();
        assert!(error.contains("no answer in time"), "{error}");
        assert!(error.contains("asks for read-write"), "{error}");
        assert!(error.contains("cluster.invalid:1 (127.0.0.1)"), "{error}");
    });
}

// Without PostgreSQL's own request for TLS only ALPN proves that the other side speaks PostgreSQL.
#[test]
fn direct_tls_to_something_else_is_refused() {
    let folder = Folder::new();
    let certificates = certificates(&folder);
    let port = free_port();
    let serve = |alpn: &str| {
        let mut command = user_command(program("bin/openssl"));
        command.args(["s_server", "-quiet", "-cert", "server.crt", "-key", "server.key"]);
        command.args(["-accept", &port.to_string()]).current_dir(folder.path());
        command.args(alpn.split_whitespace());
        let server = Spawned::start(command, &folder.path().join("tls.log"));
        wait_until("the TLS server", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    };
    let conninfo = format!(
        "host=localhost hostaddr=127.0.0.1 port={port} user=pgkeep connect_timeout=5 sslmode=verify-full sslnegotiation=direct sslrootcert={}",
        certificates.root.display()
    );
    let url = format!("file://{}", folder.make("region-eu").display());
    let keeper = Keeper::with(&folder, &conninfo, &REGION.replace("file:///tmp", &url));
    let mut plain = serve("");
    let text = keeper.run(&["check"]).expect(1).stdout;
    assert!(text.contains("did not agree to speak PostgreSQL's protocol"), "{text}");
    plain.kill9();
    // One that agrees gets further: to the startup message, which it does not answer.
    let _agreeing = serve("-alpn postgresql");
    let text = keeper.run(&["check"]).expect(1).stdout;
    assert!(text.contains("FAILED   replication connection") && !text.contains("TLS"), "{text}");
}
