(** How local errors of a steered model add up

    Blocks are maps V -> V, V any normed space; run f n x is the state after n blocks.

    Claims.
      - If steered block l is within eps_l of tuned block l at the state the steered
        model visits, and tuned block l stretches the distance between the two states
        that the models visit by at most L_l, the final states differ by at most
          sum_(l < n) eps_l L_(l+1) … L_(n-1).
      - The same when the errors are measured at the tuned model's states and L_l is
        what the steered blocks do to that distance.
      - The bound is attained (scalar linear blocks, constant errors).
      - Mixing the two, errors at tuned states with L_l of the tuned blocks, is false:
        two scalar blocks whose bound is 0 and whose error is any a >= 0.

    Assumptions.  No block needs a Lipschitz constant on the whole space (one with
    softmax attention has none): L_l is asked for at the two visited states only, and a
    constant for any set that holds both will do.

    Not said here.  How to find L_l.  Worst case: in trained models the bound is far
    above the error. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** The state after the first n blocks. *)
Fixpoint run (V : Type) (f : nat -> V -> V) n (x : V) : V :=
  if n is k.+1 then f k (run f k x) else x.

(** sum_(l < n) eps_l L_(l+1) … L_(n-1) *)
Definition error_bound (R : ringType) (eps L : nat -> R) n : R :=
  \sum_(0 <= l < n) eps l * \prod_(l.+1 <= k < n) L k.

(** bound_(n+1) = L_n bound_n + eps_n *)
Lemma error_boundS (R : comRingType) (eps L : nat -> R) n :
  error_bound eps L n.+1 = L n * error_bound eps L n + eps n.
Proof.
rewrite /error_bound big_nat_recr //= [\prod_(n.+1 <= _ < _) _]big_geq // mulr1.
congr (_ + _); rewrite mulr_sumr; apply: eq_big_nat => l /andP[_ ln].
by rewrite big_nat_recr //= mulrA [RHS]mulrC.
Qed.

Section ErrorControl.
Variables (R : realDomainType) (V : normedZmodType R).
Implicit Types (tuned steered : nat -> V -> V) (x : V).

(** Errors at the steered states, L_l from the tuned blocks. *)
Theorem error_control tuned steered eps L x n :
    (forall l, 0 <= L l) ->
    (forall l, `|tuned l (run steered l x) - tuned l (run tuned l x)|
                 <= L l * `|run steered l x - run tuned l x|) ->
    (forall l, `|steered l (run steered l x) - tuned l (run steered l x)| <= eps l) ->
  `|run steered n x - run tuned n x| <= error_bound eps L n.
Proof.
move=> L0 lip err; elim: n => [|n IHn].
  by rewrite /error_bound big_geq //= subrr normr0.
rewrite error_boundS /= [X in _ <= X]addrC.
set u := run steered n x in IHn *; set v := run tuned n x in IHn *.
rewrite -(subrKA (tuned n u)) (le_trans (le_normD _ _)) // le_add ?err //.
by rewrite (le_trans (lip _)) // le_mul2l.
Qed.

(** Errors at the tuned states, L_l from the steered blocks. *)
Theorem error_control_on_tuned_states tuned steered eps L x n :
    (forall l, 0 <= L l) ->
    (forall l, `|steered l (run steered l x) - steered l (run tuned l x)|
                 <= L l * `|run steered l x - run tuned l x|) ->
    (forall l, `|steered l (run tuned l x) - tuned l (run tuned l x)| <= eps l) ->
  `|run steered n x - run tuned n x| <= error_bound eps L n.
Proof.
move=> L0 lip err; rewrite distrC; apply: error_control => // l.
  by rewrite distrC [X in _ <= _ * X]distrC.
by rewrite distrC.
Qed.
End ErrorControl.

(** Scalar blocks x -> L_l x and x -> L_l x + eps_l attain the bound. *)
Theorem error_control_tight (R : realDomainType) (eps L : nat -> R) n :
    (forall l, 0 <= eps l) -> (forall l, 0 <= L l) ->
  `|run (fun l (x : R) => L l * x + eps l) n 0 - run (fun l (x : R) => L l * x) n 0|
    = error_bound eps L n.
Proof.
move=> e0 L0; have -> : run (fun l (x : R) => L l * x) n 0 = 0.
  by elim: n => //= n ->; rewrite mulr0.
rewrite subr0; have E : run (fun l (x : R) => L l * x + eps l) n 0 = error_bound eps L n.
  by elim: n => [|n /= ->]; rewrite ?error_boundS // /error_bound big_geq.
rewrite E ger0_norm // -E; elim: n {E} => //= n IHn.
by rewrite addr_ge0 ?mulr_ge0.
Qed.

(** The mixed version fails.  Tuned blocks x -> x and x -> 0, steered blocks x -> x + 1
    and x -> a x, both started at 0.  The errors at the tuned states are 1 and 0, the
    tuned blocks' constants 1 and 0, so the mixed bound is 0; the error is a. *)
Theorem mixed_bound_fails (R : realDomainType) (a : R) : 0 <= a ->
  let tuned l (x : R) := if l is 0%N then x else 0 in
  let steered l (x : R) := if l is 0%N then x + 1 else a * x in
  let L l : R := if l is 0%N then 1 else 0 in
  let eps l : R := if l is 0%N then 1 else 0 in
  [/\ forall l u v, `|tuned l u - tuned l v| <= L l * `|u - v|,
      forall l, `|steered l (run tuned l 0) - tuned l (run tuned l 0)| <= eps l,
      error_bound eps L 2 = 0
    & `|run steered 2 0 - run tuned 2 0| = a].
Proof.
move=> a0 tuned steered L eps.
have tuned0 l : run tuned l 0 = 0 by elim: l => //= -[|l] IHl.
split.
- by case=> [|l] u v /=; rewrite ?mul1r ?lexx // subrr normr0 mul0r.
- move=> l; rewrite tuned0; case: l => [|l] /=; first by rewrite add0r subr0 normr1.
  by rewrite mulr0 subrr normr0.
- by rewrite !error_boundS /error_bound big_geq // !(mulr0, mul0r, addr0, add0r).
- by rewrite /= add0r mulr1 subr0 ger0_norm.
Qed.
