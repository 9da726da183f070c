//! Tests of connection strings. What libpq makes of the same strings was compared by hand with
//! PostgreSQL 15, 17 and 18.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::environment::account;
use super::keywords::{KEYWORDS, SECRETS};
use super::print::quoted;
use super::*;

/// An empty environment, and a home folder that does not exist.
fn nowhere() -> Surroundings<'static> {
    Surroundings {
        home: Some("/nonexistent/home".into()),
        os_user: Some("backup".to_owned()),
        variable: Box::new(|_| None),
        default_socket_directory: "/var/run/postgresql".into(),
        system_service_directories: Vec::new(),
    }
}

fn with(variables: &[(&'static str, &str)]) -> Surroundings<'static> {
    let mut surroundings = nowhere();
    variables.iter().for_each(|(name, value)| set(&mut surroundings, name, value));
    surroundings
}

/// Sets one more variable.
fn set(surroundings: &mut Surroundings<'static>, name: &'static str, value: impl Into<OsString>) {
    let value = value.into();
    let others = std::mem::replace(&mut surroundings.variable, Box::new(|_| None));
    surroundings.variable =
        Box::new(move |asked| if asked == name { Some(value.clone()) } else { others(asked) });
}

fn parse(text: &str) -> ConnInfo {
    parse_in(text, &nowhere())
}

fn parse_in(text: &str, surroundings: &Surroundings<'_>) -> ConnInfo {
    ConnInfo::parse(text, surroundings).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn error(text: &str) -> String {
    error_in(text, &nowhere())
}

fn error_in(text: &str, surroundings: &Surroundings<'_>) -> String {
    match ConnInfo::parse(text, surroundings) {
        Ok(info) => panic!("{text} is accepted: {info:?}"),
        Err(error) => error.to_string(),
    }
}

fn tcp(name: &str, port: u16) -> HostSpec {
    HostSpec { host: Host::Tcp(name.to_owned()), hostaddr: None, port }
}

fn socket(directory: &str, port: u16) -> HostSpec {
    HostSpec { host: Host::Unix(directory.into()), hostaddr: None, port }
}

/// A home folder with these files, each with mode 0600.
fn home(files: &[(&str, &str)]) -> (tempfile::TempDir, Surroundings<'static>) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(".postgresql")).unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    }
    let surroundings = Surroundings { home: Some(folder.path().to_owned()), ..nowhere() };
    (folder, surroundings)
}

// ---- keyword = value ----

#[test]
fn an_empty_string_means_the_local_server_and_the_users_own_name() {
    let info = parse("");
    assert_eq!(info.hosts, [socket("/var/run/postgresql", 5432)]);
    assert_eq!(info.user, "backup");
    assert_eq!(info.dbname, None);
    assert_eq!(info.passfile, Some("/nonexistent/home/.pgpass".into()));
    assert_eq!(info.ssl_mode, SslMode::Prefer);
    assert_eq!(info.channel_binding, ChannelBinding::Prefer);
    assert_eq!(info.target_session_attrs, TargetSessionAttrs::Any);
    assert_eq!((info.connect_timeout, info.keepalives, info.ssl_sni), (None, true, true));
    assert_eq!(info.ssl_min_protocol_version, TlsVersion::Tls12);
    assert_eq!(info.hosts[0].socket_path(), Some("/var/run/postgresql/.s.PGSQL.5432".into()));
}

#[test]
fn spaces_may_stand_around_the_equals_sign_and_between_keywords() {
    let info = parse(" \t\nhost = db1  port=5433\x0b user\r=\tme\n");
    assert_eq!((info.hosts, info.user.as_str()), (vec![tcp("db1", 5433)], "me"));
}

#[test]
fn quotes_and_backslashes_protect_spaces_quotes_and_backslashes() {
    let info = parse(r"user='it\'s \\ me' dbname=a\ b\\c\'d application_name='' options='-c x=y'");
    assert_eq!(info.user, r"it's \ me");
    assert_eq!(info.dbname.as_deref(), Some(r"a b\c'd"));
    assert_eq!(info.application_name, None);
    assert_eq!(info.options.as_deref(), Some("-c x=y"));
    assert_eq!(parse(r"user=ends\").user, "ends");
    assert_eq!(parse("user='a'dbname=b").dbname.as_deref(), Some("b"));
    assert_eq!(parse("user=o'brien").user, "o'brien");
}

#[test]
fn a_keyword_given_twice_has_its_last_value() {
    assert_eq!(parse("user=a user=b").user, "b");
}

#[test]
fn a_value_taken_for_the_next_keyword_is_found_out() {
    assert_eq!(
        error("host= user=me"),
        "host (not shown): expected a host name or a directory; a space ends each keyword=value"
    );
}

#[test]
fn malformed_strings_say_where() {
    assert_eq!(
        error("host=db1 über user=x"),
        "connection string, character 10: a keyword without \"=\"; put values that hold spaces in \
         single quotes"
    );
    assert_eq!(
        error("user='abc"),
        "connection string, character 6: a single quote that is never closed; inside a value write \\'"
    );
    assert_eq!(error("user=a\0b"), "connection string, character 7: a NUL byte");
}

#[test]
fn unknown_keywords_are_named() {
    assert_eq!(
        error("host=db1 hots=db2"),
        "unknown keyword \"hots\" in the connection string, character 10: keywords are those of \
         libpq, such as host, user and sslmode"
    );
    assert!(error("=x").starts_with("unknown keyword \"\" in"));
    assert!(error("Host=x").starts_with("unknown keyword \"Host\" in"));
    assert!(error("ssl=true").starts_with("unknown keyword \"ssl\" in"));
    assert!(
        error("postgres:///?hots=x")
            .starts_with("unknown keyword \"hots\" in the connection URI, query parameter 1")
    );
}

// ---- URIs ----

#[test]
fn the_parts_of_a_uri_become_keywords() {
    for scheme in ["postgresql", "postgres"] {
        let info = parse(&format!("{scheme}://me:s3cret@db1:5433/orders?connect_timeout=10"));
        assert_eq!(info.hosts, [tcp("db1", 5433)]);
        assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("me", Some("orders")));
        assert_eq!(info.password, Some(Secret::new("s3cret")));
        assert_eq!(info.connect_timeout, Some(Duration::from_secs(10)));
    }
}

#[test]
fn every_part_of_a_uri_may_be_missing() {
    for text in ["postgres://", "postgres:///", "postgres://@", "postgres://?", "postgres://:@:/?"]
    {
        let info = parse(text);
        assert_eq!(info, parse(""), "{text}");
    }
    assert_eq!(parse("postgres://:5433").hosts, [socket("/var/run/postgresql", 5433)]);
    assert_eq!(parse("postgres:///orders").dbname.as_deref(), Some("orders"));
    assert_eq!(parse("postgres://me@").user, "me");
    assert_eq!(parse("postgres://db1?user=me").user, "me");
}

#[test]
fn an_empty_part_of_a_uri_leaves_the_environment_its_say_and_an_empty_parameter_does_not() {
    let environment = with(&[("PGDATABASE", "orders"), ("PGHOST", "db9")]);
    assert_eq!(parse_in("postgres:///", &environment).dbname.as_deref(), Some("orders"));
    assert_eq!(parse_in("postgres:///?dbname=", &environment).dbname, None);
    assert_eq!(parse_in("postgres:///", &environment).hosts, [tcp("db9", 5432)]);
    assert_eq!(parse_in("host=''", &environment).hosts, [socket("/var/run/postgresql", 5432)]);
}

#[test]
fn a_uri_lists_hosts_and_ipv6_addresses_in_brackets() {
    let info = parse("postgres://db1:5433,[fe80::1]:5434,db3,[::1]/orders");
    assert_eq!(
        info.hosts,
        [tcp("db1", 5433), tcp("fe80::1", 5434), tcp("db3", 5432), tcp("::1", 5432)]
    );
    assert_eq!(parse("postgres://[::1]?user=x").hosts, [tcp("::1", 5432)]);
    for text in ["postgres://[::1", "postgres://[]/x"] {
        let expected = "connection URI: host needs an IPv6 address between \"[\" and \"]\"";
        assert_eq!(error(text), expected);
    }
    assert!(error("postgres://[::1]x").contains("only a port, a comma or \"/\" may follow"));
}

#[test]
fn anything_in_a_uri_may_be_percent_encoded() {
    let info = parse(
        "postgres://%6De:p%40s%2fs%3a@%2Fvar%2Frun:5433/a%20b?%61pplication_name=%C3%BC%26%3D",
    );
    assert_eq!(info.hosts, [socket("/var/run", 5433)]);
    assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("me", Some("a b")));
    assert_eq!(info.password, Some(Secret::new("p@s/s:")));
    assert_eq!(info.application_name.as_deref(), Some("ü&="));
    assert_eq!(parse("postgres://db1%2Cdb2").hosts, [tcp("db1", 5432), tcp("db2", 5432)]);
    assert_eq!(parse("postgres://%40abstract").hosts, [socket("@abstract", 5432)]);
    assert_eq!(
        error("postgres://me:%zz@db1"),
        "connection URI: password holds a \"%\" without two hex digits: write %25"
    );
    assert!(error("postgres://me%4").contains("host holds a \"%\""));
    assert!(error("postgres://me%").contains("host holds a \"%\""));
    assert!(error("postgres://%00").contains("host holds %00"));
    assert!(error("postgres:///%ff").contains("dbname is not valid UTF-8"));
}

#[test]
fn spaces_around_a_part_of_a_uri_are_dropped_and_spaces_in_it_refused() {
    let info = parse("postgres:// me @ db1 / orders ? user = you ");
    assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("you", Some("orders")));
    assert_eq!(info.hosts, [tcp("db1", 5432)]);
    assert_eq!(parse("postgres:///?user=%20x").user, " x");
    assert_eq!(error("postgres:///a b"), "connection URI: dbname holds a space: write %20");
}

#[test]
fn query_parameters_need_one_equals_sign() {
    assert_eq!(parse("postgres:///?user=x&").user, "x");
    let expected = "connection URI: query parameter 2 needs one \"=\": write %3D and %26 for \"=\" \
                    and \"&\" in a value";
    for text in ["?user=x&y", "?user=x&&port=1", "?user=x&options=-c a=b"] {
        assert_eq!(error(&format!("postgres:///{text}")), expected);
    }
}

#[test]
fn ssl_true_in_a_uri_is_jdbcs_word_for_sslmode_require() {
    assert_eq!(parse("postgres:///?ssl=true").ssl_mode, SslMode::Require);
    assert!(error("postgres:///?ssl=false").starts_with("unknown keyword \"ssl\""));
}

// ---- hosts ----

#[test]
fn one_port_serves_all_hosts_and_else_each_has_its_own() {
    let hosts = |text: &str| parse(text).hosts;
    assert_eq!(hosts("host=a,b"), [tcp("a", 5432), tcp("b", 5432)]);
    assert_eq!(hosts("host=a,b port=6000"), [tcp("a", 6000), tcp("b", 6000)]);
    assert_eq!(hosts("host=a,b port=6000,"), [tcp("a", 6000), tcp("b", 5432)]);
    assert_eq!(
        hosts("host=a,,/tmp"),
        [tcp("a", 5432), socket("/var/run/postgresql", 5432), socket("/tmp", 5432),]
    );
    assert_eq!(
        error("host=a,b,c port=1,2"),
        "port lists 2 numbers for 3 hosts: give one for all or one for each"
    );
    assert!(error("port=1,2").contains("2 numbers for 1 hosts"));
}

#[test]
fn an_address_replaces_the_look_up_and_the_name_stays_for_the_certificate() {
    let address: Option<IpAddr> = Some("10.0.0.1".parse().unwrap());
    assert_eq!(
        parse("host=db1,db2 hostaddr=10.0.0.1,").hosts,
        [HostSpec { hostaddr: address, ..tcp("db1", 5432) }, tcp("db2", 5432)]
    );
    let info = parse("hostaddr=10.0.0.1");
    assert_eq!(info.hosts, [HostSpec { hostaddr: address, ..tcp("10.0.0.1", 5432) }]);
    let info = parse("host=/tmp hostaddr=10.0.0.1");
    assert_eq!(info.hosts[0].socket_path(), None);
    assert_eq!(
        error("host=a hostaddr=10.0.0.1,10.0.0.2"),
        "host lists 1 names and hostaddr 2 addresses: give one address for each name; it may be empty"
    );
    assert_eq!(
        error("hostaddr=db1"),
        "hostaddr \"db1\": expected an IPv4 or IPv6 address; names go into host"
    );
}

#[test]
fn a_port_is_a_number_from_1_to_65535() {
    assert_eq!(parse("port=' 5433 '").hosts[0].port, 5433);
    assert_eq!(parse("port=''").hosts[0].port, 5432);
    for text in ["0", "65536", "-1", "x", "54 32"] {
        assert_eq!(
            error_in("host=a,b", &with(&[("PGPORT", &format!("5432,{text}"))])),
            "port of host 2 (from PGPORT): expected a number from 1 to 65535 (in a URI, write %2F \
             for \"/\" in a password)"
        );
    }
}

#[test]
fn a_path_or_an_at_sign_is_a_socket_directory() {
    assert_eq!(
        parse("host=/tmp port=6000").hosts[0].socket_path(),
        Some("/tmp/.s.PGSQL.6000".into())
    );
    assert_eq!(parse("host=@x").hosts[0].socket_path(), Some("@x/.s.PGSQL.5432".into()));
    assert_eq!(parse("host=db1").hosts[0].socket_path(), None);
}

// ---- environment and services ----

#[test]
fn the_environment_fills_what_the_string_leaves_open() {
    let environment = with(&[
        ("PGHOST", "db1,db2"),
        ("PGPORT", "5433"),
        ("PGUSER", "me"),
        ("PGDATABASE", "orders"),
        ("PGPASSWORD", "s3cret"),
        ("PGPASSFILE", "/p"),
        ("PGAPPNAME", "app"),
        ("PGOPTIONS", "-c a=b"),
        ("PGCONNECT_TIMEOUT", "7"),
        ("PGSSLMODE", "require"),
        ("PGSSLNEGOTIATION", "direct"),
        ("PGSSLROOTCERT", "/root.crt"),
        ("PGSSLCERT", "/c"),
        ("PGSSLKEY", "/k"),
        ("PGSSLCRL", "/crl"),
        ("PGSSLSNI", "0"),
        ("PGSSLMINPROTOCOLVERSION", "tlsv1.3"),
        ("PGCHANNELBINDING", "require"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGTARGETSESSIONATTRS", "primary"),
        ("PGLOADBALANCEHOSTS", "random"),
    ]);
    assert_eq!(
        format!("{:?}", parse_in("user=you", &environment)),
        "ConnInfo(host=db1,db2 port=5433,5433 user=you password=*** dbname=orders passfile=/p \
         application_name=app options='-c a=b' connect_timeout=7 target_session_attrs=primary \
         load_balance_hosts=random sslmode=require sslnegotiation=direct sslrootcert=/root.crt \
         sslcert=/c sslkey=/k sslcrl=/crl sslsni=0 ssl_min_protocol_version=TLSv1.3 \
         channel_binding=require require_auth=scram-sha-256)"
    );
    let addresses = with(&[("PGHOSTADDR", "10.0.0.1")]);
    assert!(parse_in("", &addresses).hosts[0].hostaddr.is_some());
}

#[test]
fn a_bad_value_names_the_variable_it_comes_from() {
    assert_eq!(
        error_in("", &with(&[("PGSSLMODE", "verify")])),
        "sslmode \"verify\" (from PGSSLMODE): expected disable, allow, prefer, require, verify-ca \
         or verify-full"
    );
    let mut surroundings = nowhere();
    let latin: OsString = std::os::unix::ffi::OsStringExt::from_vec(vec![0xfc]);
    set(&mut surroundings, "PGUSER", latin);
    assert_eq!(error_in("", &surroundings), "environment variable PGUSER is not valid UTF-8");
}

#[test]
fn the_old_words_for_sslmode_still_work() {
    assert_eq!(parse("requiressl=1").ssl_mode, SslMode::Require);
    assert_eq!(parse("sslmode=disable requiressl=0").ssl_mode, SslMode::Prefer);
    let old = with(&[("PGREQUIRESSL", "1")]);
    assert_eq!(parse_in("", &old).ssl_mode, SslMode::Require);
    assert_eq!(parse_in("sslmode=disable", &old).ssl_mode, SslMode::Disable);
    let both = with(&[("PGREQUIRESSL", "1"), ("PGSSLMODE", "allow")]);
    assert_eq!(parse_in("", &both).ssl_mode, SslMode::Allow);
}

#[test]
fn without_any_user_name_the_error_says_how_to_set_one() {
    let nobody = Surroundings { os_user: None, ..nowhere() };
    assert!(error_in("", &nobody).starts_with("no user: set user= or PGUSER"));
    assert_eq!(parse_in("user=me", &nobody).user, "me");
}

const SERVICES: &str = "# comment\n[other]\nuser=wrong\n  [orders]  \n host=db1\nport=5433 \r\n\
                        port=9\ndbname=a = b\n\n[later]\nuser=wrong\n";

#[test]
fn a_service_gives_defaults_that_beat_the_environment() {
    let (_home, mut surroundings) = home(&[(".pg_service.conf", SERVICES)]);
    set(&mut surroundings, "PGHOST", "db9");
    let info = parse_in("service=orders", &surroundings);
    assert_eq!(info.hosts, [tcp("db1", 5433)]);
    assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("backup", Some("a = b")));
    assert_eq!(parse_in("service=orders host=db2", &surroundings).hosts, [tcp("db2", 5433)]);
    set(&mut surroundings, "PGSERVICE", "orders");
    assert_eq!(parse_in("", &surroundings).hosts, [tcp("db1", 5433)]);
    assert_eq!(parse_in("postgres:///x?service=later", &surroundings).user, "wrong");
}

#[test]
fn a_service_is_looked_for_in_the_users_file_then_in_the_systems() {
    let (home_folder, mut surroundings) = home(&[(".pg_service.conf", "[mine]\nuser=me\n")]);
    let (system, _) = home(&[("pg_service.conf", "[mine]\nuser=x\n[ours]\nuser=us\n")]);
    surroundings.system_service_directories = vec!["/nonexistent".into(), system.path().to_owned()];
    assert_eq!(parse_in("service=mine", &surroundings).user, "me");
    assert_eq!(parse_in("service=ours", &surroundings).user, "us");
    let looked_in =
        [home_folder.path().join(".pg_service.conf"), system.path().join("pg_service.conf")];
    assert_eq!(
        error_in("service=none", &surroundings),
        format!(
            "service \"none\" not found in {looked_in:?}: add it, or correct service= or PGSERVICE"
        )
    );

    let directory = system.path().to_owned();
    surroundings.system_service_directories = vec![];
    set(&mut surroundings, "PGSYSCONFDIR", directory.clone());
    assert_eq!(parse_in("service=ours", &surroundings).user, "us");
    let file = directory.join("pg_service.conf");
    set(&mut surroundings, "PGSERVICEFILE", file.clone());
    assert_eq!(parse_in("service=mine", &surroundings).user, "x");
    set(&mut surroundings, "PGSERVICEFILE", "/nonexistent/f");
    assert!(
        error_in("service=ours", &surroundings)
            .starts_with("service file \"/nonexistent/f\" cannot be read: No such file")
    );
    let given = format!("service=mine servicefile={}", file.display());
    assert_eq!(parse_in(&given, &surroundings).user, "x");
}

#[test]
fn a_malformed_service_says_which_line_and_why() {
    let cases = [
        ("host", "expected keyword=value"),
        ("hots=x", "unknown keyword \"hots\""),
        ("host = x", "unknown keyword (not shown)"),
        ("service=x", "a service cannot name another"),
        ("ldap://dir/x", "pgkeep does not ask LDAP servers; write the settings here"),
        ("user=a\0b", "a NUL byte"),
    ];
    for (line, problem) in cases {
        let (home, surroundings) = home(&[(".pg_service.conf", &format!("[s]\n{line}\n"))]);
        let path = home.path().join(".pg_service.conf");
        assert_eq!(
            error_in("service=s", &surroundings),
            format!("service file {path:?}, line 2: {problem}")
        );
    }
}

// ---- values ----

#[test]
fn timeouts_and_keepalives_are_numbers_and_zero_leaves_the_default() {
    let info = parse(
        "connect_timeout=1 keepalives=0 keepalives_idle=30 keepalives_interval=' 5 ' \
         keepalives_count=3 tcp_user_timeout=1500",
    );
    assert_eq!(info.connect_timeout, Some(Duration::from_secs(1)));
    assert!(!info.keepalives);
    assert_eq!(info.keepalives_idle, Some(Duration::from_secs(30)));
    assert_eq!(info.keepalives_interval, Some(Duration::from_secs(5)));
    assert_eq!(info.keepalives_count, Some(3));
    assert_eq!(info.tcp_user_timeout, Some(Duration::from_millis(1500)));
    let info = parse("connect_timeout=-1 keepalives=1 keepalives_idle=0 tcp_user_timeout=0");
    assert_eq!(
        (info.connect_timeout, info.keepalives_idle, info.tcp_user_timeout),
        (None, None, None)
    );
    assert!(info.keepalives);
    for keyword in [
        "connect_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
    ] {
        let expected = format!("{keyword} \"1x\": expected a whole number");
        assert_eq!(error(&format!("{keyword}=1x")), expected);
        assert!(error(&format!("{keyword}=''")).contains("expected a whole number"));
        assert!(error(&format!("{keyword}=9999999999")).contains("expected a whole number"));
    }
}

#[test]
fn choices_take_libpqs_words_and_no_others() {
    for keyword in [
        "sslmode",
        "sslnegotiation",
        "channel_binding",
        "target_session_attrs",
        "load_balance_hosts",
        "gssencmode",
        "sslcertmode",
        "sslsni",
        "min_protocol_version",
        "max_protocol_version",
    ] {
        for value in ["''", "Disable", "nonsense"] {
            let message = error(&format!("{keyword}={value}"));
            assert!(message.starts_with(keyword) && message.contains(": expected "), "{message}");
        }
    }
    for (text, mode) in SslMode::CHOICES {
        let info = parse(&format!("host=/tmp sslmode={text}"));
        assert_eq!((info.ssl_mode, mode.as_str()), (*mode, *text));
    }
}

#[test]
fn the_fallback_application_name_is_used_when_no_other_is_set() {
    let name = |text: &str| parse(text).application_name;
    assert_eq!(name("fallback_application_name=f").as_deref(), Some("f"));
    assert_eq!(name("fallback_application_name=f application_name=a").as_deref(), Some("a"));
    assert_eq!(name("fallback_application_name=f application_name=''"), None);
}

#[test]
fn required_ways_to_authenticate_allow_the_listed_or_forbid_them() {
    let require = |text: &str| parse(&format!("require_auth={text}")).require_auth;
    assert_eq!(require("''"), None);
    let scram = require("scram-sha-256,none").unwrap();
    assert!(scram.allows(AuthMethod::ScramSha256) && scram.allows(AuthMethod::None));
    assert!(!scram.allows(AuthMethod::Password) && !scram.allows(AuthMethod::Md5));
    let forbid = require("!password,!md5").unwrap();
    assert!(forbid.allows(AuthMethod::ScramSha256) && forbid.allows(AuthMethod::None));
    assert!(!forbid.allows(AuthMethod::Password) && !forbid.allows(AuthMethod::Md5));
    assert!(!require("!none").unwrap().allows(AuthMethod::None));
    for mixed in ["md5,!password", "!md5,password"] {
        assert!(error(&format!("require_auth={mixed}")).contains("either methods to allow or"));
    }
    assert!(error("require_auth=md5,md5").contains("md5 is there twice"));
    assert!(error("require_auth=md5,").contains("a list of password, md5, gss"));
    assert!(error("require_auth=scram").contains("a list of password, md5, gss"));
}

// ---- TLS ----

#[test]
fn the_systems_roots_demand_verify_full() {
    let info = parse("host=db1 sslrootcert=system");
    assert_eq!(info.ssl_mode, SslMode::VerifyFull);
    assert_eq!(info.ssl_root_cert, Some(SslRootCert::System));
    assert_eq!(parse("sslrootcert=system sslmode=verify-full").ssl_mode, SslMode::VerifyFull);
    assert_eq!(
        error_in("sslrootcert=system", &with(&[("PGSSLMODE", "require")])),
        "sslmode=require (from PGSSLMODE) is too weak for sslrootcert=system, for which anybody can \
         get a certificate: use sslmode=verify-full"
    );
    assert!(error("sslrootcert=system sslmode=verify-ca").contains("too weak"));
}

#[test]
fn verifying_needs_a_root_certificate_unless_every_host_is_a_socket() {
    assert_eq!(
        error("host=/tmp,db1 sslmode=verify-ca"),
        "sslmode=verify-ca needs a root certificate: name it with sslrootcert, put it at \
         ~/.postgresql/root.crt, or trust the system's with sslrootcert=system"
    );
    assert_eq!(parse("host=/tmp sslmode=verify-full").ssl_root_cert, None);
    let (home, surroundings) = home(&[(".postgresql/root.crt", "")]);
    let path = home.path().join(".postgresql/root.crt");
    let info = parse_in("host=db1 sslmode=verify-full", &surroundings);
    assert_eq!(info.ssl_root_cert, Some(SslRootCert::File(path)));
    let info = parse_in("host=db1 sslmode=verify-full sslrootcert=/x", &surroundings);
    assert_eq!(info.ssl_root_cert, Some(SslRootCert::File("/x".into())));
}

#[test]
fn the_files_in_the_home_folder_are_used_if_they_are_there() {
    let info = parse("sslkey=/k");
    assert_eq!((info.ssl_cert, info.ssl_key, info.ssl_crl), (None, None, None));
    let (home, surroundings) =
        home(&[(".postgresql/postgresql.crt", ""), (".postgresql/root.crl", "")]);
    let folder = home.path().join(".postgresql");
    let info = parse_in("", &surroundings);
    assert_eq!(info.ssl_cert, Some(folder.join("postgresql.crt")));
    assert_eq!(info.ssl_key, Some(folder.join("postgresql.key")));
    assert_eq!(info.ssl_crl, Some(folder.join("root.crl")));
    let info = parse_in("sslcert=/c sslkey=/k sslcrl=/l", &surroundings);
    assert_eq!(
        (info.ssl_cert, info.ssl_key, info.ssl_crl),
        (Some("/c".into()), Some("/k".into()), Some("/l".into()))
    );
    let info = parse_in("sslcertmode=disable sslcert=/c sslkey=/k", &surroundings);
    assert_eq!((info.ssl_cert, info.ssl_key), (None, None));
}

#[test]
fn direct_negotiation_needs_a_mode_that_never_falls_back_to_plain_text() {
    assert_eq!(
        error("sslnegotiation=direct"),
        "sslmode=prefer is too weak for sslnegotiation=direct: use require, verify-ca or verify-full"
    );
    let info = parse("sslnegotiation=direct sslmode=require");
    assert_eq!(info.ssl_negotiation, SslNegotiation::Direct);
}

#[test]
fn tls_versions_are_a_range_of_those_that_pgkeep_speaks() {
    let versions = |text: &str| {
        let info = parse(text);
        (info.ssl_min_protocol_version, info.ssl_max_protocol_version)
    };
    let both = (TlsVersion::Tls12, TlsVersion::Tls13);
    assert_eq!(versions("ssl_min_protocol_version=TLSv1"), both);
    assert_eq!(versions("ssl_min_protocol_version='' ssl_max_protocol_version=''"), both);
    let new = (TlsVersion::Tls13, TlsVersion::Tls13);
    assert_eq!(versions("ssl_min_protocol_version=TLSV1.3"), new);
    let old = (TlsVersion::Tls12, TlsVersion::Tls12);
    assert_eq!(versions("ssl_max_protocol_version=TLSv1.2"), old);
    assert_eq!(
        error("ssl_max_protocol_version=TLSv1.1"),
        "ssl_max_protocol_version below TLSv1.2 is not supported: pgkeep speaks TLSv1.2 and TLSv1.3"
    );
    assert_eq!(
        error("ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2"),
        "ssl_min_protocol_version is above ssl_max_protocol_version"
    );
    assert!(error("ssl_min_protocol_version=1.2").contains("expected TLSv1.2 or TLSv1.3"));
}

// ---- what pgkeep does not do ----

#[test]
fn harmless_keywords_are_taken_and_change_nothing() {
    let info = parse(
        "gssencmode=prefer sslcompression=1 client_encoding=auto replication=true krbsrvname=x \
         gsslib=gssapi gssdelegation=1 sslkeylogfile=/x min_protocol_version=3.0 \
         max_protocol_version=latest sslcertmode=allow host=/var/run/postgresql",
    );
    assert_eq!(info, parse(""));
    assert_eq!(parse("gssencmode=disable"), parse(""));
    // Only a Unix socket tells who is at its other end.
    assert_eq!(parse("host=db1 requirepeer=postgres").hosts, [tcp("db1", 5432)]);
    assert_eq!(parse("requirepeer='' sslpassword='' sslcrldir=''"), parse(""));
}

#[test]
fn what_would_weaken_the_connection_if_ignored_is_refused() {
    let cases = [
        ("gssencmode=require", "gssencmode=require is not supported: pgkeep has no Kerberos"),
        ("requirepeer=postgres", "requirepeer is not supported: keep others out"),
        ("sslpassword=x", "sslpassword is not supported: keep the key in a file without"),
        ("sslcrldir=/x", "sslcrldir is not supported: put the revocation lists into one file"),
        ("sslcertmode=require", "sslcertmode=require is not supported: demand"),
        ("min_protocol_version=3.2", "min_protocol_version above 3.0 is not supported"),
        ("min_protocol_version=latest", "min_protocol_version above 3.0 is not supported"),
        ("scram_client_key=x", "scram_client_key is not supported: use password"),
        ("scram_server_key=x", "scram_server_key is not supported: use password"),
        ("oauth_issuer=x", "oauth_issuer is not supported: pgkeep has no OAuth"),
        ("oauth_client_id=x", "oauth_client_id is not supported"),
        ("oauth_client_secret=x", "oauth_client_secret is not supported"),
        ("oauth_scope=x", "oauth_scope is not supported"),
    ];
    for (text, expected) in cases {
        let message = error(text);
        assert!(message.starts_with(expected), "{message}");
    }
    assert_eq!(
        error_in("", &with(&[("PGREQUIREPEER", "postgres")])),
        "requirepeer (from PGREQUIREPEER) is not supported: keep others out of the socket's \
         directory instead"
    );
}

// ---- passwords ----

#[test]
fn no_error_and_no_print_shows_a_password() {
    for text in [
        "password=my sec=ret",
        "password=my sec ret",
        "password='my secret",
        "password=sec ret=x host=db1",
        "postgres://me:sec/ret@db1/orders",
        "postgres://me:sec@ret@db1/orders",
        "postgres://me:12/sec?ret=x@db1/orders",
        "postgres://me:12/x?sec=ret@db1/orders",
        "postgres://me:sec%ret@db1/orders",
        "postgres://me:sec ret@db1/orders",
        "postgres://me:sec/ret",
        "postgres:///?password=a&sec=ret",
        "postgres:///?password=a=sec&ret",
        "host=db1;user=me;password=secret",
        "sslmode=require;password=secret",
        "connect_timeout=1;pwd=secret",
        "hostaddr=10.0.0.1;pwd=secret",
    ] {
        let message = error(text);
        assert!(!message.contains("sec") && !message.contains("ret"), "{text}: {message}");
    }
    for text in [
        "password=secret",
        "postgres://me:secret@db1",
        "postgres:///?password=secret",
        "dbname=x;password=secret",
        "dbname=postgres://me:secret@db1",
        "options='--Password=secret'",
    ] {
        let info = parse(text);
        let shown = format!("{info:?} {info:#?} {}", info.redacted());
        assert!(shown.contains("***") && !shown.contains("secret"), "{text}: {shown}");
    }
}

#[test]
fn an_at_sign_left_over_in_a_uri_is_refused_with_the_way_to_write_it() {
    let expected = "connection URI: host or database holds an \"@\": in user, password, host and \
                    database write %40 for \"@\", %2F for \"/\" and %3A for \":\"";
    assert_eq!(error("postgres://me:a@b@db1"), expected);
    assert_eq!(error("postgres://me:a/b@db1"), expected);
    assert_eq!(parse("postgres://db1/x?application_name=me@home").hosts, [tcp("db1", 5432)]);
}

#[test]
fn a_given_password_goes_before_the_password_file() {
    let (_home, mut surroundings) = home(&[(".pgpass", "*:*:*:*:from the file\n")]);
    let password = |text: &str, surroundings: &Surroundings<'_>| {
        let info = parse_in(text, surroundings);
        info.password_for(&info.hosts[0], "x", surroundings).unwrap()
    };
    let file = Some(Secret::new("from the file"));
    assert_eq!(password("password=given", &surroundings), Some(Secret::new("given")));
    assert_eq!(password("", &surroundings), file);
    set(&mut surroundings, "PGPASSWORD", "environment");
    assert_eq!(password("", &surroundings), Some(Secret::new("environment")));
    assert_eq!(password("password=''", &surroundings), file);
    set(&mut surroundings, "PGPASSWORD", "");
    assert_eq!(password("", &surroundings), file);
    assert_eq!(password("passfile=/nonexistent", &surroundings), None);
}

#[test]
fn the_password_file_knows_hosts_by_the_names_the_user_gave() {
    let content = "localhost:5432:*:*:socket\n/tmp:*:*:*:directory\ndb1:5433:replication:me:replica\n\
                   db1:5433:orders:me:orders\n10.0.0.1:*:*:*:address\n";
    let (_home, surroundings) = home(&[(".pgpass", content)]);
    let password = |text: &str, database: &str| {
        let info = parse_in(text, &surroundings);
        let secret = info.password_for(&info.hosts[0], database, &surroundings).unwrap();
        secret.map(|secret| String::from_utf8(secret.expose().to_vec()).unwrap())
    };
    assert_eq!(password("", "x").as_deref(), Some("socket"));
    assert_eq!(password("host=/tmp", "x").as_deref(), Some("directory"));
    assert_eq!(password("host=/tmp hostaddr=10.0.0.1", "x").as_deref(), Some("directory"));
    assert_eq!(password("hostaddr=10.0.0.1", "x").as_deref(), Some("address"));
    let db1 = "host=db1 hostaddr=10.0.0.1 port=5433 user=me";
    assert_eq!(password(db1, ConnInfo::REPLICATION_DATABASE).as_deref(), Some("replica"));
    assert_eq!(password(db1, "orders").as_deref(), Some("orders"));
    assert_eq!(password(db1, "other"), None);
}

#[test]
fn a_password_file_open_to_others_is_a_warning_for_the_caller() {
    let (home, surroundings) = home(&[(".pgpass", "*:*:*:*:x")]);
    fs::set_permissions(home.path().join(".pgpass"), PermissionsExt::from_mode(0o644)).unwrap();
    let info = parse_in("", &surroundings);
    let error = info.password_for(&info.hosts[0], "x", &surroundings).unwrap_err();
    assert!(matches!(error, PassfileError::TooOpen { mode: 0o644, .. }));
    let info = parse_in("password=x", &surroundings);
    assert!(info.password_for(&info.hosts[0], "x", &surroundings).is_ok());
}

// ---- surroundings, and all strings at once ----

#[test]
fn the_account_is_found_by_its_number() {
    let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\n\npg:x:26:26::/var/lib/pgsql:/bin/sh\n";
    assert_eq!(account(passwd, 26), Some(("pg".to_owned(), "/var/lib/pgsql".into())));
    assert_eq!(account(passwd, 27), None);
    let surroundings = Surroundings::from_process();
    assert!(surroundings.default_socket_directory.is_absolute());
    assert_eq!((surroundings.variable)("PATH"), std::env::var_os("PATH"));
}

#[test]
fn every_keyword_is_known_once() {
    let names: std::collections::BTreeSet<_> = KEYWORDS.iter().map(|keyword| keyword.0).collect();
    assert_eq!(names.len(), KEYWORDS.len());
    assert!(SECRETS.iter().all(|secret| names.contains(secret)));
}

/// Words that occur in connection strings, so that random ones get deep.
fn fragment() -> impl Strategy<Value = String> {
    let keyword = prop::sample::select(KEYWORDS).prop_map(|keyword| keyword.0.to_owned());
    let mark = prop::sample::select(
        &[
            "=",
            " = ",
            "'",
            "\\",
            " ",
            "@",
            ":",
            "/",
            "?",
            "&",
            ",",
            "[",
            "]",
            "%2F",
            "%",
            "postgres://",
        ][..],
    );
    let value = prop::sample::select(
        &[
            "db1", "::1", "10.0.0.1", "5432", "1", "require", "disable", "system", "ü", "a b",
            "!md5",
        ][..],
    );
    prop_oneof![keyword, mark.prop_map(str::to_owned), value.prop_map(str::to_owned), ".{0,4}"]
}

proptest! {
    #[test]
    fn no_string_makes_it_panic(
        scheme in prop::sample::select(&["", "postgres://", "postgresql://"][..]),
        words in prop::collection::vec(fragment(), 0..16),
    ) {
        let _ = ConnInfo::parse(&(scheme.to_owned() + &words.concat()), &nowhere());
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same(
        user in "[^\0/:;=]{1,8}",
        dbname in prop::option::of("[^\0/:;=]{1,8}"),
        hosts in prop::collection::vec("[a-z]{1,5}|/[a-z '\\\\]{1,5}|@[a-z]{1,3}|fe80::[1-9]|", 1..4),
        port in 1u16..,
        address in prop::bool::ANY,
        rest in prop::sample::subsequence(
            vec![
                "connect_timeout=3", "keepalives=0", "keepalives_idle=4", "keepalives_interval=5",
                "keepalives_count=6", "tcp_user_timeout=7", "sslmode=require", "sslnegotiation=direct",
                "sslrootcert=/r", "sslcert=/c", "sslkey='/k \\'k'", "sslcrl=/l", "sslsni=0",
                "ssl_min_protocol_version=TLSv1.3", "channel_binding=disable", "require_auth=!md5,!none",
                "target_session_attrs=prefer-standby", "load_balance_hosts=random", "passfile=/p",
                "application_name='a b'", "options='-c \\\\x'", "password=***",
            ],
            0..22,
        ),
    ) {
        let mut text = format!("host={} port={port} user={}", quoted(&hosts.join(",")), quoted(&user));
        if let Some(dbname) = dbname {
            text += &format!(" dbname={}", quoted(&dbname));
        }
        if address {
            text += &format!(" hostaddr=10.0.0.1{}", ",".repeat(hosts.len() - 1));
        }
        text += &format!(" {}", rest.join(" "));
        // Some combinations are refused; what is accepted must survive.
        if let Ok(info) = ConnInfo::parse(&text, &nowhere()) {
            prop_assert_eq!(parse(&info.redacted()), info);
        }
    }
}
