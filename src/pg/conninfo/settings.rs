//! The settings as they are gathered: for each keyword its text and who gave it. Strings, service
//! files and the environment write them, `build` reads them, each as the type that it takes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::choices::{find_choice, one_of};
use super::error::{ConnInfoError, Origin, shown};
use super::keywords::KEYWORDS;
use super::text::is_space;

/// What has been set so far, and by whom.
#[derive(Default)]
pub(super) struct Settings(BTreeMap<&'static str, Setting>);

struct Setting {
    value: String,
    origin: Origin,
}

impl Settings {
    /// Sets a keyword, once more if it is set; says whether there is such a keyword.
    pub(super) fn set(&mut self, keyword: &str, value: String, origin: Origin) -> bool {
        // A name of old that libpq still takes.
        let (keyword, value) = match keyword {
            "requiressl" if value.starts_with('1') => ("sslmode", "require".to_owned()),
            "requiressl" => ("sslmode", "prefer".to_owned()),
            _ => (keyword, value),
        };
        let Some((keyword, _, _)) = KEYWORDS.iter().find(|known| known.0 == keyword) else {
            return false;
        };
        self.0.insert(keyword, Setting { value, origin });
        true
    }

    pub(super) fn is_set(&self, keyword: &str) -> bool {
        self.0.contains_key(keyword)
    }

    /// The value as it was given, which may be empty.
    pub(super) fn value(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(|setting| setting.value.as_str())
    }

    /// A value that is not empty: where libpq takes text, an empty one stands for the default.
    pub(super) fn text(&self, keyword: &str) -> Option<&str> {
        self.value(keyword).filter(|value| !value.is_empty())
    }

    pub(super) fn owned(&self, keyword: &str) -> Option<String> {
        self.text(keyword).map(str::to_owned)
    }

    pub(super) fn path(&self, keyword: &str) -> Option<PathBuf> {
        self.text(keyword).map(PathBuf::from)
    }

    pub(super) fn list(&self, keyword: &str) -> Vec<&str> {
        self.text(keyword).map_or_else(Vec::new, |text| text.split(',').collect())
    }

    pub(super) fn choice<T: Copy>(
        &self,
        keyword: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> Result<T, ConnInfoError> {
        let Some(setting) = self.0.get(keyword) else { return Ok(default) };
        find_choice(&setting.value, choices)
            .ok_or_else(|| self.invalid(keyword, &setting.value, one_of(choices)))
    }

    /// A number as `strtol` reads it, with spaces around it.
    pub(super) fn integer(&self, keyword: &'static str) -> Result<Option<i32>, ConnInfoError> {
        let Some(setting) = self.0.get(keyword) else { return Ok(None) };
        let number = setting.value.trim_matches(is_space).parse();
        number.map(Some).map_err(|_| self.invalid(keyword, &setting.value, "a whole number"))
    }

    /// A number above 0; libpq takes the others for "not set".
    pub(super) fn positive(&self, keyword: &'static str) -> Result<Option<u32>, ConnInfoError> {
        let number = self.integer(keyword)?;
        Ok(number.and_then(|number| u32::try_from(number).ok()).filter(|&number| number > 0))
    }

    pub(super) fn origin(&self, keyword: &str) -> Origin {
        self.0.get(keyword).map_or(Origin::Given, |setting| setting.origin)
    }

    pub(super) fn invalid(
        &self,
        keyword: &'static str,
        value: &str,
        expected: impl Into<String>,
    ) -> ConnInfoError {
        let (value, origin) = (shown(value), self.origin(keyword));
        ConnInfoError::InvalidValue { keyword, value, origin, expected: expected.into() }
    }
}
