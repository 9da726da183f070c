//! Names of users and groups, from `/etc/passwd` and `/etc/group`: the same user may have another
//! number on another machine. Accounts that only a directory service knows have numbers alone.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// One kind of account.
#[derive(Clone, Debug, Default)]
struct Names {
    by_name: HashMap<String, u32>,
    by_number: HashMap<u32, String>,
}

impl Names {
    /// Lines `name:password:number:…`; the first of a number or a name counts.
    fn parse(text: &str) -> Names {
        let mut names = Names::default();
        for line in text.lines() {
            let mut fields = line.split(':');
            let (name, number) = (fields.next(), fields.nth(1));
            let (Some(name), Some(Ok(number))) = (name, number.map(str::parse::<u32>)) else {
                continue;
            };
            names.by_name.entry(name.to_owned()).or_insert(number);
            names.by_number.entry(number).or_insert_with(|| name.to_owned());
        }
        names
    }

    fn read(file: &str) -> Names {
        let text = fs::read(Path::new(file)).unwrap_or_default();
        Names::parse(&String::from_utf8_lossy(&text))
    }
}

/// The accounts of this machine.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    users: Names,
    groups: Names,
}

impl Accounts {
    /// Reads them; what cannot be read is empty.
    pub fn read() -> Accounts {
        Accounts { users: Names::read("/etc/passwd"), groups: Names::read("/etc/group") }
    }

    /// The name of a user.
    pub fn user_name(&self, number: u32) -> Option<String> {
        self.users.by_number.get(&number).cloned()
    }

    /// The name of a group.
    pub fn group_name(&self, number: u32) -> Option<String> {
        self.groups.by_number.get(&number).cloned()
    }

    /// The number of a user here: by name if there is that name, else the number itself.
    pub fn user(&self, name: Option<&str>, number: u32) -> u32 {
        name.and_then(|name| self.users.by_name.get(name)).copied().unwrap_or(number)
    }

    /// The number of a group here.
    pub fn group(&self, name: Option<&str>, number: u32) -> u32 {
        name.and_then(|name| self.groups.by_name.get(name)).copied().unwrap_or(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_counts_more_than_a_number() {
        let text = "root:x:0:0:root:/root:/bin/sh\n# no line\npostgres:x:114:120::/:/bin/sh\n:x\n";
        let accounts = Accounts { users: Names::parse(text), groups: Names::default() };
        assert_eq!(accounts.user(Some("postgres"), 999), 114);
        assert_eq!(accounts.user(Some("stranger"), 999), 999);
        assert_eq!(accounts.user(None, 999), 999);
        assert_eq!(accounts.user_name(114).as_deref(), Some("postgres"));
        assert_eq!(accounts.user_name(5), None);
    }
}
