//! How many relation files the running transactions have created.
//!
//! A commit lists the files that it removes, not those that the transaction created: each of these
//! has a record of its own, long before. So they are counted by transaction identifier until a
//! commit or abort names it. A crash of the server leaves counts behind that nobody asks for; the
//! limit gets rid of them.

use std::collections::BTreeMap;

/// The most (sub)transactions that are remembered.
const TRANSACTIONS_LIMIT: usize = 1 << 16;

/// Counts of created relation files by transaction identifier.
#[derive(Debug, Default)]
pub(super) struct CreatedFiles {
    counts: BTreeMap<u32, u32>,
}

impl CreatedFiles {
    /// A relation file was created in this (sub)transaction. At the limit all counts are forgotten;
    /// what is reported is what was seen since.
    pub(super) fn add(&mut self, xid: u32) {
        if self.counts.len() >= TRANSACTIONS_LIMIT && !self.counts.contains_key(&xid) {
            self.counts.clear();
        }
        let count = self.counts.entry(xid).or_default();
        *count = count.saturating_add(1);
    }

    /// The count of a (sub)transaction that has ended, which is forgotten.
    pub(super) fn take(&mut self, xid: u32) -> u32 {
        if self.counts.is_empty() {
            return 0;
        }
        self.counts.remove(&xid).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_bounded() {
        let mut created = CreatedFiles::default();
        for xid in 0..=TRANSACTIONS_LIMIT as u32 {
            created.add(xid);
            assert!(created.counts.len() <= TRANSACTIONS_LIMIT);
        }
        assert_eq!(created.take(0), 0);
        assert_eq!(created.take(TRANSACTIONS_LIMIT as u32), 1);
        assert_eq!(created.take(TRANSACTIONS_LIMIT as u32), 0);
    }
}
