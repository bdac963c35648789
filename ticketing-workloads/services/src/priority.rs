//! How important a request is, by what it asks for: finishing a sale goes before starting one, and that before looking.

use axum::http::{HeaderMap, Method};
use resilience::Priority;

/// The priority of a request: what its sender says that it is for, else what it asks for. The edge takes the former from
/// nobody.
pub fn of_request(headers: &HeaderMap, method: &Method, path: &str) -> Priority {
    Priority::of_request(headers).unwrap_or_else(|| of(method, path))
}

/// The priority of what is asked for.
fn of(method: &Method, path: &str) -> Priority {
    if method.is_safe() {
        // Who shows a ticket stands at the entrance.
        return if path.starts_with("/api/tickets/") { Priority::Start } else { Priority::Look };
    }
    let buys = || path.strip_prefix("/api/reservations/").is_some_and(|rest| rest.ends_with("/confirm"));
    // Payment is only ever asked for what has its seats, and told by providers of what was paid.
    let settles = || path.starts_with("/api/payments") || path.starts_with("/api/webhooks/");
    // What is given back is there for others.
    if method == Method::DELETE || buys() || settles() { Priority::Finish } else { Priority::Start }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Priority::{Finish, Look, Start};
    use resilience::priority::HEADER;

    #[rstest::rstest]
    #[case("GET", "/api/events", Look)]
    #[case("GET", "/api/bookings/1", Look)]
    #[case("GET", "/api/tickets/1", Start)]
    #[case("HEAD", "/api/bookings/1", Look)]
    #[case("GET", "/api/reservations/1/confirm", Look)]
    #[case("POST", "/api/bookings", Start)]
    #[case("POST", "/api/reservations", Start)]
    #[case("POST", "/api/reservations/confirm", Start)]
    #[case("POST", "/api/bookings/1/confirm", Start)]
    #[case("POST", "/api/reservations/1/confirm", Finish)]
    #[case("DELETE", "/api/reservations/1", Finish)]
    #[case("POST", "/api/webhooks/stripe", Finish)]
    #[case("POST", "/api/payments", Finish)]
    #[case("POST", "/api/payments/close", Finish)]
    fn by_what_is_asked_for(#[case] method: Method, #[case] path: &str, #[case] expected: Priority) {
        assert_eq!(of_request(&HeaderMap::new(), &method, path), expected);
    }

    #[test]
    fn what_a_service_of_ours_says_goes_first() {
        let headers = HeaderMap::from_iter([(HEADER, Start.to_header())]);
        assert_eq!(of_request(&headers, &Method::POST, "/api/payments"), Start);
        let headers = HeaderMap::from_iter([(HEADER, "urgent".parse().unwrap())]);
        assert_eq!(of_request(&headers, &Method::GET, "/api/bookings/1"), Look);
    }
}
