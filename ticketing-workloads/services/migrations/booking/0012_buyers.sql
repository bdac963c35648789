-- Whose a booking is, in the words of the header `x-buyer`; nobody's if it was made inside the cluster or by a pod of version 0.1.
-- `network`: where it came from, if it was made without a login, as a hash. `seats_per_buyer`: how many seats of an event one
-- buyer may have, instead of what the setting says for all.
ALTER TABLE events ADD COLUMN seats_per_buyer integer;
ALTER TABLE events ADD CONSTRAINT events_seats_per_buyer_check CHECK (seats_per_buyer > 0) NOT VALID;
ALTER TABLE bookings
    ADD COLUMN owner   text COLLATE "C",
    ADD COLUMN network text COLLATE "C";

-- Whether a buyer may take more: which limit is reached, by its place in $7 (none: nothing stands in the way), and after how many
-- seconds that may have changed, if it is known. 0 of them is the key: one of these owners has a booking under it already.
--
-- Orders of one buyer, and of one network for one event, wait here for each other until they are committed. A volatile function
-- sees what was committed before each of its statements, also within a statement that began earlier: so the one behind counts
-- what the one before has taken, and the order is one statement all the same. Who has these locks waits for nothing but the
-- row of the event, and whoever has that waits for none of these.
--
-- `lower(status)`: so that each look can only use the index that is built for it (step 43). With the column itself, the server
-- takes one that seems smaller, such as that of all reservations or of all bookings of an event, and reads it from end to end.
-- One status at a time, so that each look is one range. Generic plans: planned anew for each order, they take four times as long.
--
-- $1 owners: the buyer, and the session that it had before its login; in the order in which they are locked
-- $2 network    $3 event    $4 booking: the one that this is about    $5 keys: under which the order may be there already
-- $6 seats that are asked for
-- $7 limits, each unless it is null: seats of the event that the owners have, and that the network has; seats that the owners
--    hold of all events; reservations of the event in 6 h that came to nothing, of the owners, and of the network; payments in
--    an hour that were declined or are under way, of the owners; payments in an hour that were declined, of the network
CREATE FUNCTION buyer_limit(
    text[], text, uuid, uuid, text[], integer, integer[], OUT reached integer, OUT seconds float8
) LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    one text;
    have bigint;
    since timestamptz;
BEGIN
    IF $1 IS NULL THEN
        RETURN;
    END IF;
    FOREACH one IN ARRAY $1 LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended(one, 12));
    END LOOP;
    IF COALESCE($7[2], $7[5]) IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended($2 || ' ' || $3::text, 13));
    END IF;

    reached := 0;
    have := (SELECT count(*) FROM bookings WHERE idempotency_key = ANY($5) AND owner = ANY($1));
    IF have > 0 THEN
        RETURN;
    END IF;

    reached := 1;
    IF $7[1] IS NOT NULL THEN
        have := (SELECT sum(seats) FROM (
            SELECT ticket_count AS seats FROM bookings
            WHERE owner = ANY($1) AND lower(status) = 'held' AND event_id = $3
            UNION ALL SELECT ticket_count FROM bookings
            WHERE owner = ANY($1) AND lower(status) = 'paymentpending' AND event_id = $3
            UNION ALL SELECT ticket_count FROM bookings
            WHERE owner = ANY($1) AND lower(status) = 'confirmed' AND event_id = $3) one);
        IF COALESCE(have, 0) + $6 > $7[1] THEN
            seconds := (SELECT extract(epoch FROM min(held_until) - now()) FROM bookings
                        WHERE owner = ANY($1) AND lower(status) = 'held' AND event_id = $3);
            RETURN;
        END IF;
    END IF;

    reached := 2;
    IF $7[2] IS NOT NULL THEN
        have := (SELECT sum(seats) FROM (
            SELECT ticket_count AS seats FROM bookings
            WHERE network = $2 AND lower(status) = 'held' AND event_id = $3
            UNION ALL SELECT ticket_count FROM bookings
            WHERE network = $2 AND lower(status) = 'paymentpending' AND event_id = $3
            UNION ALL SELECT ticket_count FROM bookings
            WHERE network = $2 AND lower(status) = 'confirmed' AND event_id = $3) one);
        IF COALESCE(have, 0) + $6 > $7[2] THEN
            seconds := (SELECT extract(epoch FROM min(held_until) - now()) FROM bookings
                        WHERE network = $2 AND lower(status) = 'held' AND event_id = $3);
            RETURN;
        END IF;
    END IF;

    reached := 3;
    IF $7[3] IS NOT NULL THEN
        have := (SELECT sum(ticket_count) FROM bookings WHERE owner = ANY($1) AND lower(status) = 'held');
        IF COALESCE(have, 0) + $6 > $7[3] THEN
            seconds := (SELECT extract(epoch FROM min(held_until) - now()) FROM bookings
                        WHERE owner = ANY($1) AND lower(status) = 'held');
            RETURN;
        END IF;
    END IF;

    -- Of as many as are allowed, the oldest: until it no longer counts.
    reached := 4;
    IF $7[4] IS NOT NULL THEN
        since := (SELECT created_at FROM (
            SELECT created_at FROM bookings
            WHERE owner = ANY($1) AND lower(status) = 'held' AND event_id = $3 AND created_at > now() - interval '6 hours'
            UNION ALL SELECT created_at FROM bookings
            WHERE owner = ANY($1) AND lower(status) = 'cancelled' AND event_id = $3 AND created_at > now() - interval '6 hours'
              AND cancel_reason IN ('expired', 'given back')) one
                  ORDER BY created_at DESC OFFSET $7[4] - 1 LIMIT 1);
        IF since IS NOT NULL THEN
            seconds := extract(epoch FROM since + interval '6 hours' - now());
            RETURN;
        END IF;
    END IF;

    reached := 5;
    IF $7[5] IS NOT NULL THEN
        since := (SELECT created_at FROM (
            SELECT created_at FROM bookings
            WHERE network = $2 AND lower(status) = 'held' AND event_id = $3 AND created_at > now() - interval '6 hours'
            UNION ALL SELECT created_at FROM bookings
            WHERE network = $2 AND lower(status) = 'cancelled' AND event_id = $3 AND created_at > now() - interval '6 hours'
              AND cancel_reason IN ('expired', 'given back')) one
                  ORDER BY created_at DESC OFFSET $7[5] - 1 LIMIT 1);
        IF since IS NOT NULL THEN
            seconds := extract(epoch FROM since + interval '6 hours' - now());
            RETURN;
        END IF;
    END IF;

    reached := 6;
    IF $7[6] IS NOT NULL THEN
        have := (SELECT count(*) FROM bookings WHERE owner = ANY($1) AND lower(status) = 'paymentpending' AND id <> $4);
        since := (SELECT pending_since FROM bookings
                  WHERE owner = ANY($1) AND cancel_reason = 'declined'
                    AND pending_since > now() - interval '1 hour'
                  ORDER BY pending_since DESC OFFSET greatest($7[6] - have - 1, 0) LIMIT 1);
        IF have >= $7[6] OR since IS NOT NULL THEN
            -- What is under way may be over sooner.
            seconds := CASE WHEN have = 0 THEN extract(epoch FROM since + interval '1 hour' - now()) ELSE 60 END;
            RETURN;
        END IF;
    END IF;

    reached := 7;
    IF $7[7] IS NOT NULL THEN
        since := (SELECT pending_since FROM bookings
                  WHERE network = $2 AND cancel_reason = 'declined'
                    AND pending_since > now() - interval '1 hour'
                  ORDER BY pending_since DESC OFFSET $7[7] - 1 LIMIT 1);
        IF since IS NOT NULL THEN
            seconds := extract(epoch FROM since + interval '1 hour' - now());
            RETURN;
        END IF;
    END IF;
    reached := NULL;
END $$;
