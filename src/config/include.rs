//! `backup.include`: which paths can be captured.

use std::path::{Component, Path, PathBuf};

/// The most paths that can be named.
const MAX_PATHS: usize = 1000;

/// Says what is wrong with the paths, if anything is.
pub(super) fn problem_of(paths: &[PathBuf]) -> Option<String> {
    if paths.len() > MAX_PATHS {
        return Some(format!("at most {MAX_PATHS} paths can be named; name the folder above them"));
    }
    for (index, path) in paths.iter().enumerate() {
        let text = path.display();
        if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
            return Some(format!("\"{text}\" is no absolute path"));
        }
        if !is_plain(path) {
            return Some(format!("write \"{text}\" without \".\", \"..\" and superfluous \"/\""));
        }
        if path.parent().is_none() {
            return Some("\"/\" is the whole machine; name the folders that matter".to_owned());
        }
        for other in &paths[..index] {
            if path == other {
                return Some(format!("\"{text}\" is named twice"));
            }
            let (outer, inner) = match path.starts_with(other) {
                true => (other, path),
                false if other.starts_with(path) => (path, other),
                false => continue,
            };
            let (outer, inner) = (outer.display(), inner.display());
            return Some(format!("\"{inner}\" lies in \"{outer}\", which holds it already"));
        }
    }
    None
}

/// Whether the text is the only way to write the path.
fn is_plain(path: &Path) -> bool {
    let rebuilt: PathBuf = path.components().collect();
    rebuilt.as_os_str() == path.as_os_str()
        && !path.components().any(|part| part == Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(paths: &[&str]) -> Option<String> {
        problem_of(&paths.iter().map(PathBuf::from).collect::<Vec<_>>())
    }

    #[test]
    fn absolute_paths_side_by_side_are_good() {
        assert_eq!(problem(&[]), None);
        assert_eq!(problem(&["/etc/postgresql", "/etc/postgresql-common", "/root/.pgpass"]), None);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        for (paths, word) in [
            (vec!["etc/postgresql"], "etc/postgresql"),
            (vec![""], "absolute"),
            (vec!["/etc/../root"], "/etc/../root"),
            (vec!["/etc/postgresql/"], "superfluous"),
            (vec!["/etc/./postgresql"], "superfluous"),
            (vec!["/"], "whole machine"),
            (vec!["/etc/a", "/etc/b", "/etc/a"], "twice"),
            (vec!["/etc", "/etc/a"], "lies in"),
            (vec!["/etc/a", "/etc"], "lies in"),
        ] {
            let problem = problem(&paths).unwrap();
            assert!(problem.contains(word), "{problem}");
        }
    }
}
