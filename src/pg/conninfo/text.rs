//! The two syntaxes of a connection string, `keyword = value …` and URI, read into settings. Their
//! grammar stands at the top of [`conninfo`](super).

use super::error::{ConnInfoError, Origin, shown};
use super::keywords::SECRETS;
use super::settings::Settings;

/// Reads `keyword = value …`.
pub(super) fn parse_pairs(text: &str, settings: &mut Settings) -> Result<(), ConnInfoError> {
    let position = |rest: &str| text[..text.len() - rest.len()].chars().count() + 1;
    let syntax = |rest, problem| ConnInfoError::Syntax { position: position(rest), problem };
    let mut rest = text.trim_start_matches(is_space);
    let mut after_secret = false;
    while !rest.is_empty() {
        let end = rest.find(|c| c == '=' || is_space(c)).unwrap_or(rest.len());
        let (keyword, behind) = rest.split_at(end);
        let Some(value) = behind.trim_start_matches(is_space).strip_prefix('=') else {
            let problem = "a keyword without \"=\"; put values that hold spaces in single quotes";
            return Err(syntax(rest, problem));
        };
        let value = value.trim_start_matches(is_space);
        let Some((plain, behind)) = take_value(value) else {
            let problem = "a single quote that is never closed; inside a value write \\'";
            return Err(syntax(value, problem));
        };
        if !settings.set(keyword, plain, Origin::Given) {
            let place = format!("the connection string, character {}", position(rest));
            return Err(unknown(keyword, after_secret, place));
        }
        after_secret |= SECRETS.contains(&keyword);
        rest = behind.trim_start_matches(is_space);
    }
    Ok(())
}

/// A value without its quotes and backslashes, and what follows; none if a quote is not closed.
fn take_value(text: &str) -> Option<(String, &str)> {
    let quoted = text.starts_with('\'');
    let mut characters = text.char_indices().skip(usize::from(quoted));
    let mut value = String::new();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            space if !quoted && is_space(space) => return Some((value, &text[at..])),
            other => value.push(other),
        }
    }
    (!quoted).then_some((value, ""))
}

/// Reads what follows `postgresql://`.
pub(super) fn parse_uri(uri: &str, settings: &mut Settings) -> Result<(), ConnInfoError> {
    // The first @ ends the credentials, unless a slash comes before it.
    let end = uri.find(['@', '/']).filter(|&at| uri[at..].starts_with('@'));
    let (credentials, rest) = end.map_or(("", uri), |at| (&uri[..at], &uri[at + 1..]));
    let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    if place.contains('@') {
        return Err(in_uri(
            "host or database",
            "holds an \"@\": in user, password, host and \
             database write %40 for \"@\", %2F for \"/\" and %3A for \":\"",
        ));
    }
    let (hosts, ports, dbname) = take_hosts(place)?;
    let parts = [
        ("user", user),
        ("password", password),
        ("host", &hosts),
        ("port", &ports),
        ("dbname", dbname),
    ];
    for (keyword, part) in parts {
        // An empty part leaves the keyword to the environment; in a query it would not.
        if !part.is_empty() {
            settings.set(keyword, decode(keyword, part)?, Origin::Given);
        }
    }
    // An @ that did not end credentials may belong to a password with a slash and a question mark.
    parse_query(query, end.is_none() && query.contains('@'), settings)
}

/// The lists of hosts and ports, and the database.
fn take_hosts(mut rest: &str) -> Result<(String, String, &str), ConnInfoError> {
    let (mut hosts, mut ports) = (String::new(), String::new());
    loop {
        let host;
        if let Some(inner) = rest.strip_prefix('[') {
            let end = inner.find(']').filter(|&end| end > 0);
            let end =
                end.ok_or_else(|| in_uri("host", "needs an IPv6 address between \"[\" and \"]\""))?;
            (host, rest) = (&inner[..end], &inner[end + 1..]);
            if !rest.is_empty() && !rest.starts_with([':', '/', ',']) {
                return Err(in_uri(
                    "host",
                    "goes on after \"]\": only a port, a comma or \"/\" may follow",
                ));
            }
        } else {
            (host, rest) = rest.split_at(rest.find([':', '/', ',']).unwrap_or(rest.len()));
        }
        hosts.push_str(host);
        if let Some(behind) = rest.strip_prefix(':') {
            let port;
            (port, rest) = behind.split_at(behind.find(['/', ',']).unwrap_or(behind.len()));
            ports.push_str(port);
        }
        let Some(next) = rest.strip_prefix(',') else { break };
        rest = next;
        hosts.push(',');
        ports.push(',');
    }
    Ok((hosts, ports, rest.strip_prefix('/').unwrap_or("")))
}

/// Reads what follows the question mark.
fn parse_query(
    mut query: &str,
    mut hide_keywords: bool,
    settings: &mut Settings,
) -> Result<(), ConnInfoError> {
    let mut number = 0;
    while !query.is_empty() {
        let (pair, next) = query.split_once('&').unwrap_or((query, ""));
        (query, number) = (next, number + 1);
        let place = format!("query parameter {number}");
        let Some((keyword, value)) = pair.split_once('=').filter(|pair| !pair.1.contains('='))
        else {
            return Err(in_uri(
                place,
                "needs one \"=\": write %3D and %26 for \"=\" and \"&\" in a value",
            ));
        };
        let (keyword, value) = (decode(&place, keyword)?, decode(&place, value)?);
        hide_keywords |= SECRETS.contains(&keyword.as_str());
        let known = match (keyword.as_str(), value.as_str()) {
            // JDBC's way to say it.
            ("ssl", "true") => settings.set("sslmode", "require".to_owned(), Origin::Given),
            _ => settings.set(&keyword, value, Origin::Given),
        };
        if !known {
            return Err(unknown(&keyword, hide_keywords, format!("the connection URI, {place}")));
        }
    }
    Ok(())
}

/// Undoes percent-encoding. Like libpq 18, drops spaces around a part and refuses those in it.
fn decode(part: &str, text: &str) -> Result<String, ConnInfoError> {
    let refuse = |problem| in_uri(part, problem);
    let mut plain = Vec::new();
    let mut bytes = text.trim_matches(' ').bytes();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b' ' => return Err(refuse("holds a space: write %20")),
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let code = digit().and_then(|high| Some((high << 4 | digit()?) as u8));
                match code {
                    None => return Err(refuse("holds a \"%\" without two hex digits: write %25")),
                    Some(0) => return Err(refuse("holds %00: a NUL byte is never allowed")),
                    Some(code) => code,
                }
            }
            other => other,
        });
    }
    String::from_utf8(plain).map_err(|_| refuse("is not valid UTF-8 once decoded"))
}

/// What C calls a space.
pub(super) fn is_space(character: char) -> bool {
    character.is_ascii_whitespace() || character == '\x0b'
}

fn in_uri(part: impl Into<String>, problem: &'static str) -> ConnInfoError {
    ConnInfoError::Uri { part: part.into(), problem }
}

fn unknown(keyword: &str, hide: bool, place: String) -> ConnInfoError {
    // After a password an unknown keyword may be the rest of it.
    let keyword = if hide { "(not shown)".to_owned() } else { shown(keyword) };
    ConnInfoError::UnknownKeyword { keyword, place }
}
