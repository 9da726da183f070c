//! Plain SQL, answered by what the statements mention rather than by what they are: so that they
//! may be written differently tomorrow. What is not understood is answered with nothing, and said
//! loudly in the trace.

use pgkeep::wal::{Lsn, SegmentSize, TimelineId};

use crate::server::{Connection, lsn};
use crate::wal::{SEGMENT, SYSTEM_ID};
use crate::wire;
use crate::world::Slot;

/// The expressions of a select list: what stands between commas outside of parentheses.
fn select_list(sql: &str) -> Vec<String> {
    let after = sql.trim_start().get(6..).unwrap_or_default();
    let (mut depth, mut list, mut current) = (0, Vec::new(), String::new());
    for word in after.split_inclusive(|c: char| " ,()".contains(c)) {
        if depth == 0 && word.trim().eq_ignore_ascii_case("from") {
            break;
        }
        let (text, end) = match word.chars().last() {
            Some(last) if "(),".contains(last) => (&word[..word.len() - 1], last),
            _ => (word, ' '),
        };
        current.push_str(text);
        match end {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => list.push(std::mem::take(&mut current)),
            _ => {}
        }
        if end != ' ' && !(end == ',' && depth == 0) {
            current.push(end);
        }
    }
    list.push(current);
    list.into_iter().map(|text| text.trim().to_lowercase()).collect()
}

impl Connection {
    pub fn sql(&mut self, sql: &str) {
        let lower = sql.to_lowercase();
        if lower.starts_with("set ") || lower.starts_with("begin") || lower.starts_with("commit") {
            wire::complete(&mut self.output, "SET");
        } else if lower.starts_with("checkpoint") {
            wire::complete(&mut self.output, "CHECKPOINT");
        } else if lower.contains("pg_replication_slot_advance") {
            self.advance_slot(sql);
        } else if lower.contains("pg_create_physical_replication_slot") {
            let name = sql.split('\'').nth(1).unwrap_or_default().to_owned();
            self.create_slot(&name, lower.contains("true"));
        } else if lower.starts_with("select") {
            self.select(sql);
        } else {
            self.note(format!("UNKNOWN SQL {sql}"));
            wire::rows(&mut self.output, 1, &[], "SELECT 0");
        }
        wire::ready(&mut self.output);
    }

    /// Names and positions stand between quotes, in whatever order.
    fn advance_slot(&mut self, sql: &str) {
        let quoted: Vec<&str> = sql.split('\'').skip(1).step_by(2).collect();
        let to = quoted.iter().find(|text| text.contains('/')).map_or(Lsn::INVALID, |t| lsn(t));
        let name = quoted.iter().find(|text| !text.contains('/')).copied();
        let known = self.sim.change(|world| {
            let flushed = world.hosts[self.host].flushed;
            let slot = world.hosts[self.host].slots.get_mut(name.unwrap_or_default());
            slot.map(|slot| {
                slot.restart = slot.restart.max(Some(to.min(flushed)));
                wire::value(slot.restart.unwrap_or(to))
            })
        });
        match known {
            Some(at) => wire::rows(&mut self.output, 1, &[vec![at]], "SELECT 1"),
            None => wire::error(&mut self.output, "ERROR", "42704", "the slot does not exist"),
        }
    }

    fn select(&mut self, sql: &str) {
        let list = select_list(sql);
        let slots: Vec<(String, Slot)> = {
            let world = self.sim.world();
            let slots = &world.hosts[self.host].slots;
            slots.iter().map(|(name, slot)| (name.clone(), slot.clone())).collect()
        };
        let lower = sql.to_lowercase();
        let rows: Vec<_> = if lower.contains("from pg_replication_slots") {
            let wanted = |name: &str| !sql.contains('\'') || sql.contains(&format!("'{name}'"));
            let slots = slots.iter().filter(|(name, _)| wanted(name));
            slots.map(|slot| self.row(sql, &list, Some(slot))).collect()
        } else {
            vec![self.row(sql, &list, None)]
        };
        let tag = format!("SELECT {}", rows.len());
        wire::rows(&mut self.output, list.len(), &rows, &tag);
    }

    fn row(
        &self,
        sql: &str,
        list: &[String],
        slot: Option<&(String, Slot)>,
    ) -> Vec<Option<bytes::Bytes>> {
        list.iter().map(|expression| self.expression(sql, expression, slot)).collect()
    }

    fn expression(
        &self,
        sql: &str,
        expression: &str,
        slot: Option<&(String, Slot)>,
    ) -> Option<bytes::Bytes> {
        let has = |word: &str| expression.contains(word);
        let flag = |on: bool| wire::value(if on { "t" } else { "f" });
        if let Some((name, slot)) = slot {
            return match () {
                () if has("from ") || has("()") => self.server_expression(sql, expression),
                () if has("slot_type") => wire::value("physical"),
                () if has("application_name") => slot.active.and_then(|_| wire::value("pgkeep")),
                () if has("active_pid") => slot.active.and_then(wire::value),
                () if has("wal_status") => wire::value(if slot.lost { "lost" } else { "reserved" }),
                () if has("safe_wal_size") => None,
                () if has("restart_lsn") => slot.restart.and_then(wire::value),
                () if has("slot_name") => wire::value(name),
                () if has("active") => flag(slot.active.is_some()),
                () if has("temporary") => flag(false),
                () => self.unknown(sql, expression),
            };
        }
        self.server_expression(sql, expression)
    }

    /// What does not depend on a slot.
    fn server_expression(&self, sql: &str, expression: &str) -> Option<bytes::Bytes> {
        let has = |word: &str| expression.contains(word);
        let flag = |on: bool| wire::value(if on { "t" } else { "f" });
        let (standby, flushed, timeline, limit) = {
            let world = self.sim.world();
            let host = &world.hosts[self.host];
            (host.standby, host.flushed, host.timeline, world.slot_limit)
        };
        match () {
            () if has("pg_is_in_recovery") && expression.len() < 22 => flag(standby),
            () if has("clock_timestamp") => wire::value(1_795_000_000_000_000_u64),
            () if has("safe_wal_size") => None,
            () if has("_lsn") => wire::value(flushed),
            () if has("timeline") => wire::value(timeline),
            () if has("max_slot_wal_keep_size") => {
                wire::value(limit.map_or(-1, |limit| (limit >> 20) as i64))
            }
            () if has("synchronous_standby_names") => wire::value(""),
            () if has("synchronous_commit") => wire::value("on"),
            () if has("system_identifier") => wire::value(SYSTEM_ID),
            () if has("name") && sql.contains("pg_ls_waldir") => self.oldest_file(sql),
            () if has("server_version") => wire::value("17.6"),
            () if expression == "1" => wire::value(1),
            () => self.unknown(sql, expression),
        }
    }

    /// The first file in `pg_wal` whose name begins with the timeline in the statement.
    fn oldest_file(&self, sql: &str) -> Option<bytes::Bytes> {
        let digits =
            sql.split(['^', '\'']).find(|text| text.len() >= 8 && text.starts_with("0000"));
        let timeline = u32::from_str_radix(digits?.get(..8)?, 16).ok()?;
        let world = self.sim.world();
        let host = &world.hosts[self.host];
        let wal = world.wal_of(self.host);
        let on_path = wal.path(host.timeline).into_iter().find(|step| step.0 == timeline)?;
        let first = host.oldest.max(wal.start(timeline));
        let size = SegmentSize::new(SEGMENT).ok()?;
        let exists = on_path.2.is_none_or(|end| first < end);
        let name = size.name(TimelineId(timeline), size.segment_of(first));
        exists.then(|| wire::value(name)).flatten()
    }

    fn unknown(&self, sql: &str, expression: &str) -> Option<bytes::Bytes> {
        self.note(format!("UNKNOWN SQL {expression:?} in {sql}"));
        None
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_select_list_is_split_at_its_own_commas() {
        let list = super::select_list("SELECT a, f(b, c) || coalesce(' x', ''), d FROM t WHERE e");
        assert_eq!(list, ["a", "f(b, c) || coalesce(' x', '')", "d"]);
        assert_eq!(super::select_list("SELECT pg_is_in_recovery()"), ["pg_is_in_recovery()"]);
    }
}
