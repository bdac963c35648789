-- Something to book right after the installation.
INSERT INTO events (id, name, capacity, available)
SELECT '11111111-1111-4111-8111-111111111111', 'Opening Night', 100000, 100000
WHERE NOT EXISTS (SELECT FROM events);
