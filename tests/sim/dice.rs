//! Chance that a seed repeats, on every machine and with every version of every library.
//!
//! Draws that belong to one thing (a request, a connection) come from dice of their own, made from
//! the seed and the thing's name: so one more draw somewhere changes nothing elsewhere.

/// Splitmix64.
#[derive(Clone, Debug)]
pub struct Dice(u64);

/// One number out of many.
pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9E37_79B9_7F4A_7C15, |state, part| Dice(state ^ part).next())
}

/// A text as a number (FNV-1a).
pub fn number_of(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

impl Dice {
    /// Dice for one purpose.
    pub fn new(seed: u64, purpose: &str) -> Dice {
        Dice(mix(&[seed, number_of(purpose)]))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 up to, and without, `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True so many times in a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// Bytes that compress a little.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 16);
        while bytes.len() < length {
            let word = self.next();
            bytes.extend(word.to_le_bytes());
            bytes.extend([word as u8; 8]);
        }
        bytes.truncate(length);
        bytes
    }
}
