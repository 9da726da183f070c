//! Content hashes: BLAKE3, keyed, so that the same content has the same name whoever stores it.
//!
//! The key is derived from the system identifier: two clusters never share a name by accident.
//! (Once objects are encrypted it will be derived from a secret, and names tell nothing.)

use std::fmt;
use std::str::FromStr;

/// The context of the key derivation; a constant of the format.
const KEY_CONTEXT: &str = "pgkeep v1 content hash";

/// The key that all content hashes of one lineage use.
#[derive(Clone)]
pub struct ContentKey([u8; 32]);

/// A full BLAKE3 hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash(pub [u8; 32]);

/// The first eight bytes of a [`ContentHash`]: sixteen hex digits in names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortHash(pub u64);

/// Hashes content that arrives in parts.
#[derive(Clone)]
pub struct ContentHasher(blake3::Hasher);

impl ContentKey {
    /// The key of the lineage with this system identifier.
    pub fn for_system(system_id: u64) -> ContentKey {
        ContentKey(blake3::derive_key(KEY_CONTEXT, &system_id.to_le_bytes()))
    }

    /// Starts a hash.
    pub fn hasher(&self) -> ContentHasher {
        ContentHasher(blake3::Hasher::new_keyed(&self.0))
    }

    /// Hashes content that is there as a whole.
    pub fn hash(&self, content: &[u8]) -> ContentHash {
        ContentHash(*blake3::keyed_hash(&self.0, content).as_bytes())
    }
}

impl ContentHasher {
    /// Adds the next part.
    pub fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// The hash of all parts so far.
    pub fn finish(&self) -> ContentHash {
        ContentHash(*self.0.finalize().as_bytes())
    }
}

impl ContentHash {
    /// The part of it that goes into names.
    pub fn short(&self) -> ShortHash {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        ShortHash(u64::from_be_bytes(first))
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ContentHash {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut hash = [0; 32];
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(());
        }
        for (index, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| ())?;
        }
        Ok(ContentHash(hash))
    }
}

impl serde::Serialize for ContentHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ContentHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| serde::de::Error::custom("not a hash of 64 hex digits"))
    }
}

impl fmt::Display for ShortHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ShortHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ShortHash {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let lower_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 16 || !text.bytes().all(lower_hex) {
            return Err(());
        }
        u64::from_str_radix(text, 16).map(ShortHash).map_err(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_between_clusters_and_not_between_archivers() {
        let one = ContentKey::for_system(7_000_000_000_000_000_001);
        let other = ContentKey::for_system(7_000_000_000_000_000_002);
        assert_eq!(
            one.hash(b"wal"),
            ContentKey::for_system(7_000_000_000_000_000_001).hash(b"wal")
        );
        assert_ne!(one.hash(b"wal"), other.hash(b"wal"));
        let mut hasher = one.hasher();
        hasher.update(b"w");
        hasher.update(b"al");
        assert_eq!(hasher.finish(), one.hash(b"wal"));
    }

    #[test]
    fn hashes_survive_printing_and_parsing() {
        let hash = ContentKey::for_system(1).hash(b"");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!(hash.short().to_string().parse(), Ok(hash.short()));
        assert!(hash.to_string().starts_with(&hash.short().to_string()));
        assert!("0123456789ABCDEF".parse::<ShortHash>().is_err());
    }
}
