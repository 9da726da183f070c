//! The line between pgkeep and PostgreSQL: cut, slow, silent. The archive equals the server's own
//! files all the same.

use std::time::Duration;

use pgkeep::wal::{Lsn, SegmentSize, TimelineId};

use crate::support::{Content, Fault, Folder, Keeper, Proxy, Server, ServerOptions, wait_until};

const FIRST: TimelineId = TimelineId(1);

/// A server that keeps all its WAL, and an archiver that reaches it through a proxy.
fn behind_a_proxy(folder: &Folder) -> (Server, Proxy, Keeper) {
    let settings = "wal_keep_size = 512MB\nmax_wal_size = 1GB".to_owned();
    let server = Server::new(
        folder,
        17,
        &ServerOptions { settings, no_fsync: true, ..ServerOptions::default() },
    );
    let proxy = Proxy::tcp(server.port);
    let mut keeper = Keeper::new(folder, &server, &["eu"]);
    let through = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", proxy.port());
    keeper.edit_config(&server.conninfo(), &through);
    keeper.start();
    (server, proxy, keeper)
}

/// Compares the region with the server's own files.
fn assert_equals_pg_wal(keeper: &Keeper, server: &Server) {
    let size = SegmentSize::DEFAULT;
    let (start, wal) = Content::of(keeper, "eu", server.system_id()).wal(FIRST);
    assert!(wal.len() as u64 >= size.bytes(), "not even one segment was written");
    let mut at = start;
    for segment in wal.chunks(size.bytes() as usize) {
        let file = std::fs::read(server.wal_file(FIRST, at)).unwrap();
        assert!(file[..segment.len()] == *segment, "the segment at {at} differs");
        at = at.advance(segment.len() as u64);
    }
}

// CASES 13 and 22.
#[test]
fn a_connection_that_is_cut_again_and_again_costs_no_byte() {
    let folder = Folder::new();
    let (server, proxy, mut keeper) = behind_a_proxy(&folder);
    for round in 0..6 {
        proxy.set(match round % 3 {
            0 => Fault::None,
            1 => Fault::Throttle(8_000_000),
            _ => Fault::Delay(Duration::from_millis(2)),
        });
        let id = server.system_id();
        let before = Content::of(&keeper, "eu", id).end(FIRST);
        server.write_bulk(4);
        wait_until("some of the WAL", || {
            keeper.assert_runs();
            Content::of(&keeper, "eu", id).end(FIRST) > before
        });
        // In the middle of it, as often as not.
        proxy.reset_connections();
    }
    proxy.set(Fault::None);
    let end = keeper.wait_stored(&server, &["eu"]);
    assert!(end > Lsn(0));
    keeper.stop();
    assert_equals_pg_wal(&keeper, &server);
}

// CASES 13: a line that is dead without a word is noticed; a quiet one is left alone.
#[test]
fn a_line_that_went_silent_is_given_up() {
    let folder = Folder::new();
    let (server, proxy, mut keeper) = behind_a_proxy(&folder);
    server.write_bulk(17);
    keeper.wait_stored(&server, &["eu"]);
    proxy.set(Fault::Hang);
    server.sql("CREATE TABLE t (n int)");
    wait_until("the silence to be told", || {
        keeper.assert_runs();
        let status = keeper.ask_sidecar(Duration::from_secs(5)).unwrap_or_default();
        status["streaming"] == false
    });
    proxy.set(Fault::None);
    keeper.wait_stored(&server, &["eu"]);
    keeper.stop();
    assert_equals_pg_wal(&keeper, &server);
}
