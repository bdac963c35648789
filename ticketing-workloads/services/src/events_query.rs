//! `?category&page&pageSize`: which events somebody wants to see.

/// Longest name of a category, in bytes.
const MAX_CATEGORY_BYTES: usize = 64;

/// A page of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventsQuery {
    /// Only this category; all if absent.
    pub category: Option<String>,
    /// From 1 to 10,000.
    pub page: u32,
    /// From 1 to 100.
    pub page_size: u32,
}

/// What is wrong with a query.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} must be {must_be}")]
pub struct QueryError {
    name: &'static str,
    must_be: &'static str,
}

impl EventsQuery {
    /// Reads the query of an address. What it does not know it passes over, as addresses get decorated on their way.
    pub fn read(query: Option<&str>) -> Result<Self, QueryError> {
        let mut read = Self { category: None, page: 1, page_size: 20 };
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            match name.as_ref() {
                "page" => read.page = number("page", &value, 10_000, "a whole number from 1 to 10000")?,
                "pageSize" => read.page_size = number("pageSize", &value, 100, "a whole number from 1 to 100")?,
                "category" if value.is_empty() => read.category = None,
                "category" => {
                    let plain = value.len() <= MAX_CATEGORY_BYTES && !value.chars().any(char::is_control);
                    let must_be = "a text of at most 64 bytes without control characters";
                    read.category =
                        Some(plain.then(|| value.into_owned()).ok_or(QueryError { name: "category", must_be })?);
                }
                _ => {}
            }
        }
        Ok(read)
    }

    /// The query in one spelling, so that equal ones are equal.
    pub fn to_query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(category) = &self.category {
            query.append_pair("category", category);
        }
        query.append_pair("page", &self.page.to_string());
        query.append_pair("pageSize", &self.page_size.to_string());
        query.finish()
    }
}

fn number(name: &'static str, value: &str, most: u32, must_be: &'static str) -> Result<u32, QueryError> {
    value.parse().ok().filter(|number| (1..=most).contains(number)).ok_or(QueryError { name, must_be })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("", "page=1&pageSize=20")]
    #[case("pageSize=5&page=2&category=rock+%26+roll", "category=rock+%26+roll&page=2&pageSize=5")]
    #[case("category=&utm_source=mail", "page=1&pageSize=20")]
    #[case("category=a%00b", "category must be a text")]
    #[case("page=0", "page must be a whole number")]
    #[case("page=-1", "page must be")]
    #[case("page=99999999999999", "page must be")]
    #[case("pageSize=101", "pageSize must be a whole number from 1 to 100")]
    fn reads_a_query_or_says_what_is_wrong(#[case] query: &str, #[case] expected: &str) {
        match EventsQuery::read(Some(query)) {
            Ok(read) => assert_eq!(read.to_query(), expected),
            Err(error) => assert!(error.to_string().starts_with(expected), "{error}"),
        }
    }

    #[test]
    fn a_category_is_bounded() {
        assert!(EventsQuery::read(Some(&format!("category={}", "x".repeat(64)))).is_ok());
        assert!(EventsQuery::read(Some(&format!("category={}", "x".repeat(65)))).is_err());
    }
}
