(** The first-order shift is the derivative along the update: what a JVP returns

    Claim.  If φ is differentiable with derivative φ', then for every coordinate,

      d/dt  glu(W_g + t dW_g, W_u + t dW_u, W_d + t dW_d)(u)  at t = 0  =  shift,

    the shift of glu_expansion.v; and d/dt glu(W)(u + t v) at t = 0 is the shift of
    the steer v at mlp_in.

    Assumptions.  φ is differentiable everywhere (SiLU and GELU are, ReLU is not).

    Setting.  The reals of MathComp-Analysis; [is_derive x v f df] reads "the
    derivative of f at x in the direction v exists and is df". *)
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import boolp functions reals topology normedtype derive realfun.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory numFieldNormedType.Exports.
Local Open Scope ring_scope.

Section Derivative.
Variables (R : realType) (d n o : nat) (phi phi' : R -> R).
Hypothesis phi_derive : forall x, is_derive x (1 : R) phi (phi' x).
Variables (Wg Wu dWg dWu : 'M[R]_(n, d)) (Wd dWd : 'M[R]_(o, n)).
Variable u : 'cV[R]_d.

(** d/dt (a + t b) = b *)
Lemma is_derive_affine (a b : R) : is_derive (0 : R) (1 : R) (fun t : R => a + t * b) b.
Proof.
have -> : (fun t : R => a + t * b) = cst a + b \*: id.
  by apply/funext => t /=; rewrite mulrC.
by apply: is_derive_eq; rewrite add0r [LHS]mulr1.
Qed.

(** Derivative at 0 of (c + t dc) φ(a + t g) (b + t e). *)
Lemma is_derive_term (c dc a g b e : R) :
  is_derive (0 : R) (1 : R)
    (fun t : R => (c + t * dc) * (phi (a + t * g) * (b + t * e)))
    (dc * (phi a * b) + c * (phi' a * b * g + phi a * e)).
Proof.
have Dc := is_derive_affine c dc; have Da := is_derive_affine a g.
have Db := is_derive_affine b e.
have Ds : is_derive (0 : R) (1 : R) (phi \o (fun t : R => a + t * g)) (phi' a * g).
  by apply: is_derive1_comp; rewrite mul0r addr0.
have D := is_deriveM Dc (is_deriveM Ds Db).
apply: (is_derive_eq D); rewrite [LHS]addrC.
have -> : ((phi \o (fun t : R => a + t * g)) * (fun t : R => b + t * e)) 0
        = phi (a + 0 * g) * (b + 0 * e) by [].
rewrite /= !mul0r !addr0 /GRing.scale /= (mulrC _ dc); congr (_ + c * _).
by rewrite addrC mulrA (mulrC b).
Qed.

(** When the pre-activations move along eg, eu and W_d along dW_d, the derivative
    of the output is dW_d m + W_d dm. *)
Lemma is_derive_gate (ag au eg eu : 'cV[R]_n) i :
  is_derive (0 : R) (1 : R)
    (fun t : R => ((Wd + t *: dWd) *m gate phi (ag + t *: eg) (au + t *: eu)) i 0)
    ((dWd *m gate phi ag au + Wd *m dgate phi phi' ag au eg eu) i 0).
Proof.
pose F j (t : R) := (Wd i j + t * dWd i j)
  * (phi (ag j 0 + t * eg j 0) * (au j 0 + t * eu j 0)).
have -> : (fun t : R => ((Wd + t *: dWd) *m gate phi (ag + t *: eg) (au + t *: eu)) i 0)
        = \sum_j F j.
  apply/funext => t; rewrite fct_sumE mxE.
  by apply: eq_bigr => j _; rewrite /F !mxE.
have -> : (dWd *m gate phi ag au + Wd *m dgate phi phi' ag au eg eu) i 0
  = \sum_j (dWd i j * (phi (ag j 0) * au j 0)
            + Wd i j * (phi' (ag j 0) * au j 0 * eg j 0 + phi (ag j 0) * eu j 0)).
  rewrite mxE [in X in X + _]mxE [in X in _ + X]mxE -big_split /=.
  by apply: eq_bigr => j _; rewrite !mxE.
by apply: is_derive_sum => j; exact: is_derive_term.
Qed.

(** The shift of an update is the derivative of the output along it. *)
Theorem shift_update_is_derivative i :
  is_derive (0 : R) (1 : R)
    (fun t : R => glu phi (Wg + t *: dWg) (Wu + t *: dWu) (Wd + t *: dWd) u i 0)
    (shift_update phi phi' Wg Wu Wd dWg dWu dWd u i 0).
Proof.
under eq_fun do rewrite /glu !(mulmxDl _ _ u) -!(scalemxAl _ _ u).
exact: is_derive_gate.
Qed.
End Derivative.

(** The shift of a steer v at mlp_in is the derivative of the output along it. *)
Theorem shift_mlp_in_is_derivative (R : realType) d n o (phi phi' : R -> R)
    (Wg Wu : 'M[R]_(n, d)) (Wd : 'M[R]_(o, n)) u v i :
    (forall x, is_derive x (1 : R) phi (phi' x)) ->
  is_derive (0 : R) (1 : R)
    (fun t : R => glu phi Wg Wu Wd (u + t *: v) i 0)
    (shift_mlp_in phi phi' Wg Wu Wd u v i 0).
Proof.
move=> phi_derive.
have := is_derive_gate phi_derive Wd 0 (Wg *m u) (Wu *m u) (Wg *m v) (Wu *m v) i.
rewrite mul0mx add0r.
by under eq_fun do rewrite scaler0 addr0 !scalemxAr -!mulmxDr.
Qed.
