//! What `synchronous_standby_names` means for an archiver: whether commits wait for it, and whether
//! that can work. Pure.
//!
//! ```text
//! names      [FIRST] n (name, …) | ANY n (name, …) | name, …      the last: FIRST 1
//! name       letters, digits, _ and $ | "anything, "" for a quote" | *
//! ```
//! (PostgreSQL documentation, "synchronous_standby_names"; names are compared without regard to
//! upper and lower case, `*` stands for every standby.)

/// `synchronous_standby_names`, when it names anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynchronousNames {
    /// Whether any of them will do (`ANY`), or the first that are connected (`FIRST`).
    pub any: bool,
    /// How many a commit waits for.
    pub count: usize,
    /// The names, in their order.
    pub names: Vec<String>,
}

/// The part that an archiver plays in synchronous replication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SynchronousRole {
    /// Commits do not wait for it.
    NotNamed,
    /// Its name is in the list.
    Named {
        /// Whether any of the list will do.
        any: bool,
        /// How many a commit waits for.
        count: usize,
        /// Its place, from 1 on.
        position: usize,
        /// How many names there are.
        total: usize,
    },
    /// It is not named, but `*` takes every standby.
    ByStar,
    /// The setting cannot be read.
    Unclear(String),
}

/// What to think of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SynchronousVerdict {
    /// All is well.
    Fine(String),
    /// It works, and may not be meant.
    Warning {
        /// How it is.
        detail: String,
        /// What to do.
        hint: &'static str,
    },
    /// Commits hang.
    Broken {
        /// How it is.
        detail: String,
        /// What to do.
        hint: &'static str,
    },
}

impl SynchronousNames {
    /// Reads the setting; `None` when it is empty.
    ///
    /// # Errors
    /// What PostgreSQL would not understand either.
    pub fn parse(setting: &str) -> Result<Option<SynchronousNames>, String> {
        let mut tokens = tokens(setting)?;
        if tokens.is_empty() {
            return Ok(None);
        }
        let keyword = |token: Option<&Token>, word: &str| matches!(token, Some(Token::Word(text)) if text.eq_ignore_ascii_case(word));
        let is_number = |token: Option<&Token>| matches!(token, Some(Token::Word(text)) if text.bytes().all(|b| b.is_ascii_digit()));
        let any = keyword(tokens.first(), "ANY");
        if (any || keyword(tokens.first(), "FIRST")) && is_number(tokens.get(1)) {
            tokens.remove(0);
        }
        let mut count = 1;
        let mut with_count = false;
        if let (Some(Token::Word(number)), Some(Token::Mark('('))) = (tokens.first(), tokens.get(1))
        {
            count = number.parse().ok().filter(|count| *count > 0).ok_or("no number before (")?;
            if tokens.pop() != Some(Token::Mark(')')) {
                return Err("the list is not closed".into());
            }
            tokens.drain(..2);
            with_count = true;
        }
        let names = names_of(&tokens)?;
        Ok(Some(SynchronousNames { any: any && with_count, count, names }))
    }

    /// The part of an archiver that connects with this `application_name`.
    pub fn role_of(&self, application_name: &str) -> SynchronousRole {
        // PostgreSQL folds ASCII letters only, unless the server's locale knows better.
        let is_own = |name: &String| name.to_lowercase() == application_name.to_lowercase();
        let is_star = |name: &String| name == "*";
        let Some(index) = self.names.iter().position(|name| is_own(name) || is_star(name)) else {
            return SynchronousRole::NotNamed;
        };
        // Behind a star the own name changes nothing.
        if is_star(&self.names[index]) && !self.names.iter().any(is_own) {
            return SynchronousRole::ByStar;
        }
        SynchronousRole::Named {
            any: self.any,
            count: self.count,
            position: index + 1,
            total: self.names.len(),
        }
    }
}

impl SynchronousRole {
    /// The part of an archiver with this `application_name` in the setting's text.
    pub fn of(setting: &str, application_name: &str) -> SynchronousRole {
        match SynchronousNames::parse(setting) {
            Ok(None) => SynchronousRole::NotNamed,
            Ok(Some(names)) => names.role_of(application_name),
            Err(problem) => SynchronousRole::Unclear(problem),
        }
    }

    /// What to think of it, with the server's `synchronous_commit`.
    pub fn verdict(&self, synchronous_commit: &str) -> SynchronousVerdict {
        use SynchronousVerdict::{Broken, Fine, Warning};
        let commits = match self {
            SynchronousRole::NotNamed => {
                return Fine("commits do not wait for this archiver".into());
            }
            SynchronousRole::Unclear(problem) => {
                return Warning {
                    detail: format!("synchronous_standby_names cannot be read: {problem}"),
                    hint: "look whether commits wait for this archiver: sync_state in pg_stat_replication",
                };
            }
            SynchronousRole::ByStar => {
                "synchronous_standby_names has '*', which takes this archiver too".to_owned()
            }
            SynchronousRole::Named { any: true, count, total, .. } => {
                format!("commits wait for any {count} of {total} names, this archiver among them")
            }
            SynchronousRole::Named { count, position, total, .. } if position > count => format!(
                "commits wait for the first {count} of {total} names; this archiver is number {position} and steps in for one that is away"
            ),
            SynchronousRole::Named { .. } => "commits wait for this archiver".to_owned(),
        };
        // "local" and "off" wait for nobody.
        let nobody = matches!(synchronous_commit, "local" | "off");
        if synchronous_commit == "remote_apply" {
            return Broken {
                detail: format!("{commits}, and synchronous_commit = remote_apply"),
                hint: "an archiver applies nothing: commits that wait for it would wait for ever. Set synchronous_commit = on, or name only standbys",
            };
        }
        match self {
            SynchronousRole::ByStar => Warning {
                detail: commits,
                hint: "name the standbys instead if that is not meant: commits may wait for the archive, or be satisfied with it",
            },
            _ if nobody => Fine(format!(
                "{commits}, but synchronous_commit = {synchronous_commit} waits for nobody"
            )),
            _ => Fine(commits),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    /// A keyword, a number or a name without quotes.
    Word(String),
    /// A name in quotes, or a star.
    Name(String),
    /// A comma or a bracket.
    Mark(char),
}

fn tokens(setting: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = setting.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c' => {}
            ',' | '(' | ')' => tokens.push(Token::Mark(c)),
            '*' => tokens.push(Token::Name("*".into())),
            '"' => {
                let mut name = String::new();
                loop {
                    match rest.next() {
                        Some('"') if rest.next_if_eq(&'"').is_some() => name.push('"'),
                        Some('"') => break,
                        Some(c) => name.push(c),
                        None => return Err("a quoted name does not end".into()),
                    }
                }
                tokens.push(Token::Name(name));
            }
            c if is_word(c) => {
                let mut word = c.to_string();
                while let Some(c) = rest.next_if(|c| is_word(*c)) {
                    word.push(c);
                }
                tokens.push(Token::Word(word));
            }
            c => return Err(format!("{c:?} must be in double quotes")),
        }
    }
    Ok(tokens)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii()
}

/// Names with commas between them.
fn names_of(tokens: &[Token]) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        match token {
            Token::Word(name) | Token::Name(name) if index % 2 == 0 => names.push(name.clone()),
            Token::Mark(',') if index % 2 == 1 => {}
            other => return Err(format!("{other:?} is out of place")),
        }
    }
    if tokens.len().is_multiple_of(2) { Err("a name is missing".into()) } else { Ok(names) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(setting: &str) -> (bool, usize, Vec<String>) {
        let names = SynchronousNames::parse(setting).unwrap().unwrap();
        (names.any, names.count, names.names)
    }

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn every_form_of_the_setting_is_read() {
        assert_eq!(SynchronousNames::parse(" \n"), Ok(None));
        assert_eq!(parsed("a"), (false, 1, list(&["a"])));
        assert_eq!(parsed("a, b"), (false, 1, list(&["a", "b"])));
        assert_eq!(parsed("2 (a, b,c)"), (false, 2, list(&["a", "b", "c"])));
        assert_eq!(parsed("FIRST 2(a, b)"), (false, 2, list(&["a", "b"])));
        assert_eq!(parsed("any 1 (a, \"b, \"\"c\"\"\")"), (true, 1, list(&["a", "b, \"c\""])));
        assert_eq!(parsed("*"), (false, 1, list(&["*"])));
        assert_eq!(parsed("ANY 3 (*)"), (true, 3, list(&["*"])));
        // Keywords and numbers can be names too.
        assert_eq!(parsed("first, any"), (false, 1, list(&["first", "any"])));
        assert_eq!(parsed("7"), (false, 1, list(&["7"])));
        for bad in ["a b", "a,", ",a", "ANY (a)", "2 (a", "0 (a)", "a-b", "\"a", "x 1 (a)", "()"] {
            assert!(SynchronousNames::parse(bad).is_err(), "{bad:?} was understood");
        }
    }

    #[test]
    fn the_archiver_knows_its_part() {
        let named =
            |any, count, position, total| SynchronousRole::Named { any, count, position, total };
        for (setting, role) in [
            ("", SynchronousRole::NotNamed),
            ("node1, node2", SynchronousRole::NotNamed),
            // Words inside of other names are not the name.
            ("\"pgkeep-2\", my_pgkeep", SynchronousRole::NotNamed),
            ("PgKeep", named(false, 1, 1, 1)),
            ("node1, \"pgkeep\"", named(false, 1, 2, 2)),
            ("ANY 2 (node1, pgkeep, node2)", named(true, 2, 2, 3)),
            ("*", SynchronousRole::ByStar),
            ("node1, *", SynchronousRole::ByStar),
            ("pgkeep, *", named(false, 1, 1, 2)),
        ] {
            assert_eq!(SynchronousRole::of(setting, "pgkeep"), role, "{setting}");
        }
        assert!(matches!(SynchronousRole::of("a-b", "pgkeep"), SynchronousRole::Unclear(_)));
    }

    // CASES 40.
    #[test]
    fn commits_that_would_hang_are_told_from_those_that_wait() {
        let told = |setting: &str, commit: &str| match SynchronousRole::of(setting, "pgkeep")
            .verdict(commit)
        {
            SynchronousVerdict::Fine(detail) => ("fine", detail),
            SynchronousVerdict::Warning { detail, .. } => ("warning", detail),
            SynchronousVerdict::Broken { detail, .. } => ("broken", detail),
        };
        assert_eq!(told("", "remote_apply").0, "fine");
        assert_eq!(told("node1", "remote_apply").0, "fine");
        assert_eq!(told("pgkeep", "remote_apply").0, "broken");
        assert_eq!(told("node1, pgkeep", "remote_apply").0, "broken");
        assert_eq!(told("*", "remote_apply").0, "broken");
        assert_eq!(told("*", "on").0, "warning");
        assert_eq!(told("pgkeep", "on"), ("fine", "commits wait for this archiver".into()));
        assert!(told("node1, pgkeep", "on").1.contains("number 2"));
        assert!(told("ANY 1 (node1, pgkeep)", "remote_write").1.contains("any 1 of 2"));
        assert!(told("pgkeep", "local").1.contains("waits for nobody"));
        assert_eq!(told("a b", "on").0, "warning");
    }
}
