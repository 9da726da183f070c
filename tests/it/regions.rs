//! Regions that come and go.

use crate::support::{Folder, Keeper, S3Server, Server, ServerOptions, wait_until};

#[test]
fn an_s3_region_that_restarts_in_the_middle_catches_up() {
    let folder = Folder::new();
    let mut s3 = S3Server::start(&folder);
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE t (n int, filler text)");
    let local = folder.make("region-eu");
    let regions = format!(
        "[[region]]\nname = \"eu\"\nurl = \"file://{}\"\n{}",
        local.display(),
        s3.region("us", "prod")
    );
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    keeper.run(&["check"]).expect(0);
    keeper.start();
    keeper.backup();
    let insert = "INSERT INTO t SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n";
    server.sql(insert);
    keeper.wait_archived(&server, &["eu", "us"]);
    s3.kill9();
    server.sql(insert);
    // The other region stays current, and the state is told.
    keeper.wait_archived(&server, &["eu"]);
    wait_until("the outage to be told", || {
        let status = keeper.status();
        status["regions"][1]["state"] == "unreachable" && status["regions"][0]["state"] == "healthy"
    });
    // A backup now reaches one region only, and says so.
    let output = keeper.run(&["backup"]).expect(7);
    assert!(output.stderr.contains("region us"), "{}", output.stderr);
    s3.restart();
    server.sql(insert);
    let expected = server.sql("SELECT count(*) FROM t");
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
    server.stop();
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &["--region", "us"]);
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT count(*) FROM t"), expected);
    copy.check_integrity();
}

// Memory is bounded: what one region has is dropped for the other, and copied from there later.
#[test]
fn a_region_that_missed_more_than_memory_holds_is_filled_from_the_other() {
    let folder = Folder::new();
    let mut s3 = S3Server::start(&folder);
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    let local = folder.make("region-eu");
    let regions = format!(
        "[[region]]\nname = \"eu\"\nurl = \"file://{}\"\n{}",
        local.display(),
        s3.region("us", "small")
    );
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    keeper.edit_config("[wal]", "[wal]\nmemory_limit = \"64MiB\"");
    keeper.start();
    keeper.backup();
    keeper.wait_archived(&server, &["eu", "us"]);
    s3.kill9();
    // Hardly compressible, and more than memory_limit.
    server.sql("CREATE TABLE t AS SELECT n, sha512((n || 'x')::bytea) AS a, sha512((n || 'y')::bytea) AS b FROM generate_series(1, 900000) n");
    let content = "SELECT count(*) || ' ' || sum(hashtext(t::text)::bigint) FROM t";
    let expected = server.sql(content);
    keeper.wait_archived(&server, &["eu"]);
    s3.restart();
    keeper.wait_archived(&server, &["eu", "us"]);
    assert!(
        keeper.log().contains("copying WAL from other regions"),
        "nothing had to be copied:\n{}",
        keeper.log()
    );
    keeper.stop();
    server.stop();
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &["--region", "us"]);
    copy.wait_until_writable();
    assert_eq!(copy.sql(content), expected);
}

#[test]
fn a_region_that_lost_everything_is_not_filled_in_silence() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    server.sql("CREATE TABLE t (n int)");
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
    std::fs::remove_dir_all(keeper.region("us").join("orders")).unwrap();
    keeper.start();
    server.sql("INSERT INTO t VALUES (1)");
    keeper.wait_archived(&server, &["eu"]);
    let told = || {
        keeper.status()["regions"][1]["last_error"].as_str().unwrap_or("").contains("--new-region")
    };
    wait_until("the loss to be told", told);
    assert!(!keeper.region("us").join("orders").join("lineage.json").exists());
    keeper.stop();
    keeper.start_with(&["--new-region", "us"]);
    server.sql("INSERT INTO t VALUES (2)");
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
}
